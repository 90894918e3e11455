// Puts the columns that each rank of a host has side by side on every rank that wants them, in one step. Elements are
// words of four bytes that are copied, not looked at. A row always belongs to the same block index.
#include "peer_memory.h"

namespace {

constexpr int kThreads = 128;

struct Ends {
    int64_t of[kMostRanks + 1];  // of rank r: of[r] to of[r + 1]
};

__global__ void __launch_bounds__(kThreads) gather_columns_kernel(GatherColumnsArgs a, Regions regions, Ends ends) {
    const int block = int(blockIdx.x), rank = int(a.rank), ranks = int(a.ranks);
    Signs& mine = regions.signs(rank);
    const uint32_t call = mine.calls[block] + 1;
    const int64_t slot = slot_of(call, a.slot_bytes);
    const auto row_of = [&](int of, int64_t row) {
        const int64_t width = ends.of[of + 1] - ends.of[of];
        return reinterpret_cast<uint32_t*>(regions.of[of] + slot) + row * width;
    };
    const int64_t own = ends.of[rank + 1] - ends.of[rank];
    for (int64_t row = block; row < a.rows; row += kMostBlocks)
        for (int64_t i = threadIdx.x; i < own; i += kThreads)
            row_of(rank, row)[i] = static_cast<const uint32_t*>(a.x)[row * a.x_stride + i];
    meet(regions, rank, ranks, call, a.stop, a.fault);
    if (a.out)
        for (int64_t row = block; row < a.rows; row += kMostBlocks)
            for (int from = 0; from < ranks; from++)
                for (int64_t i = threadIdx.x; i < ends.of[from + 1] - ends.of[from]; i += kThreads)
                    static_cast<uint32_t*>(a.out)[row * a.out_stride + ends.of[from] + i] = row_of(from, row)[i];
    if (threadIdx.x == 0) mine.calls[block] = call;
}

}  // namespace

extern "C" EXPORT int shoal_gather_columns(const GatherColumnsArgs* a) {
    if (a->ranks < 1 || a->ranks > kMostRanks || a->slot_bytes % 32) return kNotSupported;
    Ends ends = {};
    for (int64_t rank = 0; rank < a->ranks; rank++) {
        if (a->rows * a->widths[rank] * 4 > a->slot_bytes) return kNotSupported;
        ends.of[rank + 1] = ends.of[rank] + a->widths[rank];
    }
    const dim3 grid(unsigned(a->rows < kMostBlocks ? a->rows : kMostBlocks));
    return launch("gather_columns", gather_columns_kernel, grid, kThreads, 0, a->stream, *a,
                  regions_of(a->regions, a->ranks), ends);
}
