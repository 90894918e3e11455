// Sums over the ranks of one host in one step: each rank puts its part into memory that the others read, and adds up all
// parts itself, in the order of the ranks, so that every rank has the same bits.
// A piece of 1024 elements always belongs to the same block index, whatever the count.
#include "peer_memory.h"

namespace {

constexpr int kThreads = 128;
constexpr int kPiece = kThreads * 8;
template <typename T>
__global__ void __launch_bounds__(kThreads) all_reduce_kernel(AllReduceArgs a, Regions regions) {
    const int block = int(blockIdx.x), rank = int(a.rank), ranks = int(a.ranks);
    Signs& mine = regions.signs(rank);
    const uint32_t call = mine.calls[block] + 1;
    const int64_t slot = slot_of(call, a.slot_bytes);
    const auto part = [&](int of) { return reinterpret_cast<T*>(regions.of[of] + slot); };
    T* x = static_cast<T*>(a.x);
    const int64_t first = int64_t(block) * kPiece + threadIdx.x * 8, step = int64_t(kMostBlocks) * kPiece;
    const bool aligned = reinterpret_cast<uintptr_t>(x) % sizeof(Eight<T>) == 0;

    float sum[8], more[8];
    for (int64_t i = first; i < a.count; i += step) {
        const int count = int(a.count - i < 8 ? a.count - i : 8);
        load_eight(sum, x + i, count, aligned && count == 8);
        store_eight(part(rank) + i, sum, count, count == 8);
    }
    meet(regions, rank, ranks, call, a.stop, a.fault);
    for (int64_t i = first; i < a.count; i += step) {
        const int count = int(a.count - i < 8 ? a.count - i : 8);
        load_eight(sum, part(0) + i, count, count == 8);
        for (int other = 1; other < ranks; other++) {
            load_eight(more, part(other) + i, count, count == 8);
            UNROLL for (int e = 0; e < 8; e++) sum[e] += more[e];
        }
        store_eight(x + i, sum, count, aligned && count == 8);
    }
    if (threadIdx.x == 0) mine.calls[block] = call;
}

template <typename T>
int start(const AllReduceArgs& a) {
    if (a.count * int64_t(sizeof(T)) > a.slot_bytes) return kNotSupported;
    const Regions regions = regions_of(a.regions, a.ranks);
    const int64_t pieces = (a.count + kPiece - 1) / kPiece;
    const dim3 grid(unsigned(pieces < kMostBlocks ? pieces : kMostBlocks));
    return launch("all_reduce", all_reduce_kernel<T>, grid, kThreads, 0, a.stream, a, regions);
}

}  // namespace

extern "C" EXPORT int shoal_all_reduce(const AllReduceArgs* a) {
    if (a->ranks < 1 || a->ranks > kMostRanks || a->slot_bytes % 32) return kNotSupported;
    switch (a->dtype) {
        case kFloat32: return start<float>(*a);
        case kBFloat16: return start<bf16>(*a);
        case kFloat16: return start<fp16>(*a);
        default: return kNotSupported;
    }
}
