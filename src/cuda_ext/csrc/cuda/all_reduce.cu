// Sums over the ranks of one host through memory that all of them reach, in one step or in two. Elements are added up in
// the order of the ranks and rounded once, so both forms give every rank the same bits.
//
// One step: each rank puts its part into its slot, all meet, and each adds up all parts itself: it reads ranks - 1 times
// the bytes of x from the others. Two steps: each adds up only its share of the elements, puts the sums over its own part
// of them, all meet again, and each reads the others' sums: 2 (ranks - 1) / ranks times the bytes of x.
//
// A piece of 1024 elements always belongs to the same block index, whatever the count. A block's warps take chunks of 256
// of them; in two steps chunk c of a block is the (c % ranks)-th rank's.
#include "peer_memory.h"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunk = kWarpSize * 8;
constexpr int kPiece = kWarps * kChunk;
constexpr int kAtOnce = 4;  // chunks that a warp reads before it writes one

// About what a rank reads from others in the time of one more meeting (2.5 us at 300 GB/s; not measured).
constexpr int64_t kMeetingBytes = 768 << 10;

// Chunks first, first + step, … below end, by the calling lane: reads some, then writes them.
template <typename Read, typename Write>
__device__ __forceinline__ void walk(int first, int step, int end, const Read& read, const Write& write) {
    KEEP_LOOP for (int chunk = first; chunk < end; chunk += kAtOnce * step) {
        float values[kAtOnce][8];
        UNROLL for (int n = 0; n < kAtOnce; n++)
            if (chunk + n * step < end) read(values[n], chunk + n * step);
        UNROLL for (int n = 0; n < kAtOnce; n++)
            if (chunk + n * step < end) write(values[n], chunk + n * step);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) all_reduce_kernel(AllReduceArgs a, Regions regions) {
    begin_kernel();
    const int block = int(blockIdx.x), rank = int(a.rank), ranks = int(a.ranks);
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    Signs& mine = regions.signs(rank);
    const uint32_t call = mine.calls[block] + 1;
    const int64_t slot = slot_of(call, a.slot_bytes);
    T* x = static_cast<T*>(a.x);
    const bool is_x_aligned = reinterpret_cast<uintptr_t>(x) % sizeof(Eight<T>) == 0;
    const int pieces = int((a.count + kPiece - 1) / kPiece);
    const int chunks = (pieces - block + kMostBlocks - 1) / kMostBlocks * kWarps;

    // Of a chunk: where the lane's eight elements begin, and how many of them there are.
    const auto place = [&](int chunk) {
        return (int64_t(chunk / kWarps) * kMostBlocks + block) * kPiece + chunk % kWarps * kChunk + lane * 8;
    };
    const auto count = [&](int64_t at) { return int(a.count - at < 0 ? 0 : a.count - at < 8 ? a.count - at : 8); };
    const auto read_x = [&](float (&to)[8], int chunk) {
        const int64_t at = place(chunk);
        load_eight(to, x + at, count(at), is_x_aligned && count(at) == 8);
    };
    const auto write_x = [&](const float (&from)[8], int chunk) {
        const int64_t at = place(chunk);
        store_eight(x + at, from, count(at), is_x_aligned && count(at) == 8);
    };
    const auto read = [&](float (&to)[8], int of, int chunk) {
        const int64_t at = place(chunk);
        load_eight(to, reinterpret_cast<const T*>(regions.of[of] + slot) + at, count(at), count(at) == 8);
    };
    const auto write = [&](const float (&from)[8], int chunk) {
        const int64_t at = place(chunk);
        store_eight(reinterpret_cast<T*>(regions.of[rank] + slot) + at, from, count(at), count(at) == 8);
    };
    const auto read_sum = [&](float (&to)[8], int chunk) {
        read(to, 0, chunk);
        for (int other = 1; other < ranks; other++) {
            float more[8];
            read(more, other, chunk);
            UNROLL for (int e = 0; e < 8; e++) to[e] += more[e];
        }
    };

    walk(warp, kWarps, chunks, read_x, write);
    meet(regions, rank, ranks, call, kFirst, a.stop, a.fault);
    if (a.steps == 1) {
        walk(warp, kWarps, chunks, read_sum, write_x);
    } else {
        walk(rank + warp * ranks, kWarps * ranks, chunks, read_sum, write);
        meet(regions, rank, ranks, call, kSecond, a.stop, a.fault);
        walk(warp, kWarps, chunks, [&](float (&to)[8], int chunk) { read(to, chunk % ranks, chunk); }, write_x);
    }
    if (threadIdx.x == 0) mine.calls[block] = call;
}

// That take less time for so many bytes.
int64_t steps_for(int64_t bytes, int64_t ranks) {
    return bytes * (ranks - 1) * (ranks - 2) / ranks < kMeetingBytes ? 1 : 2;
}

// What does not fit a slot goes in parts.
template <typename T>
int start(AllReduceArgs a) {
    const Regions regions = regions_of(a.regions, a.ranks);
    const int64_t most = a.slot_bytes / int64_t(sizeof(T)), steps = a.steps, whole = a.count;
    T* x = static_cast<T*>(a.x);
    for (int64_t begin = 0; begin < whole; begin += most) {
        a.x = x + begin;
        a.count = whole - begin < most ? whole - begin : most;
        a.steps = steps ? steps : steps_for(a.count * int64_t(sizeof(T)), a.ranks);
        const int64_t pieces = (a.count + kPiece - 1) / kPiece;
        const dim3 grid(unsigned(pieces < kMostBlocks ? pieces : kMostBlocks));
        const int status = launch("all_reduce", all_reduce_kernel<T>, grid, kThreads, 0, a.stream, a, regions);
        if (status != kOk) return status;
    }
    return kOk;
}

}  // namespace

extern "C" EXPORT int shoal_all_reduce(const AllReduceArgs* a) {
    if (a->ranks < 1 || a->ranks > kMostRanks || a->slot_bytes <= 0 || a->slot_bytes % 32) return kNotSupported;
    if (a->steps < 0 || a->steps > 2) return kNotSupported;
    switch (a->dtype) {
        case kFloat32: return start<float>(*a);
        case kBFloat16: return start<bf16>(*a);
        case kFloat16: return start<fp16>(*a);
        default: return kNotSupported;
    }
}
