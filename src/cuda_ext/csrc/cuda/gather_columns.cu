// Puts the columns that each rank of a host has side by side on every rank that wants them, in one step. Elements are
// words of four bytes that are copied, not looked at. A row always belongs to the same block index.
#include "peer_memory.h"

namespace {

constexpr int kThreads = 128;

struct Ends {
    int of[kMostRanks + 1];  // of rank r: of[r] to of[r + 1]
};

__global__ void __launch_bounds__(kThreads) gather_columns_kernel(GatherColumnsArgs a, Regions regions, Ends ends) {
    begin_kernel();
    const int block = int(blockIdx.x), rank = int(a.rank), ranks = int(a.ranks);
    Signs& mine = regions.signs(rank);
    const uint32_t call = mine.calls[block] + 1;
    const int64_t slot = slot_of(call, a.slot_bytes);
    const auto row_of = [&](int of, int row) {
        return reinterpret_cast<uint32_t*>(regions.of[of] + slot) + int64_t(row) * (ends.of[of + 1] - ends.of[of]);
    };
    for (int row = block; row < a.rows; row += kMostBlocks) {
        const uint32_t* from = static_cast<const uint32_t*>(a.x) + row * a.x_stride;
        uint32_t* to = row_of(rank, row);
        KEEP_LOOP for (int i = int(threadIdx.x); i < ends.of[rank + 1] - ends.of[rank]; i += kThreads) to[i] = from[i];
    }
    meet(regions, rank, ranks, call, kFirst, a.stop, a.fault);
    for (int row = block; a.out && row < a.rows; row += kMostBlocks)
        for (int peer = 0; peer < ranks; peer++) {
            const uint32_t* from = row_of(peer, row);
            uint32_t* to = static_cast<uint32_t*>(a.out) + row * a.out_stride + ends.of[peer];
            KEEP_LOOP for (int i = int(threadIdx.x); i < ends.of[peer + 1] - ends.of[peer]; i += kThreads) to[i] = from[i];
        }
    if (threadIdx.x == 0) mine.calls[block] = call;
}

}  // namespace

extern "C" EXPORT int shoal_gather_columns(const GatherColumnsArgs* a) {
    if (a->ranks < 1 || a->ranks > kMostRanks || a->slot_bytes % 32) return kNotSupported;
    Ends ends = {};
    for (int64_t rank = 0; rank < a->ranks; rank++) {
        if (a->rows * a->widths[rank] * 4 > a->slot_bytes) return kNotSupported;
        ends.of[rank + 1] = ends.of[rank] + int(a->widths[rank]);
    }
    const dim3 grid(unsigned(a->rows < kMostBlocks ? a->rows : kMostBlocks));
    return launch("gather_columns", gather_columns_kernel, grid, kThreads, 0, a->stream, *a,
                  regions_of(a->regions, a->ranks), ends);
}
