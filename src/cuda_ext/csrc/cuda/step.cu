// How one step hands on to the next, and its states to the head: drawn tokens become the next step's inputs without the
// host, and the rows whose logits are wanted are put side by side.
#include "launch.h"

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) feed_tokens_kernel(FeedTokensArgs a) {
    begin_kernel();
    const int64_t token = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (token >= a.tokens) return;
    const int source = a.sources[token];
    if (source < 0 || source >= a.rows) return;
    const int64_t id = a.drawn[source];
    a.token_ids[token] = id < 0 ? 0 : id;
}

// Blocks along y share a row.
__global__ void __launch_bounds__(kThreads) take_rows_kernel(TakeRowsArgs a, bool aligned) {
    begin_kernel();
    const int64_t row = a.rows[blockIdx.x];
    if (row < 0 || row >= a.x_rows) return;
    const auto* from = static_cast<const unsigned char*>(a.x) + row * a.row_bytes;
    auto* to = static_cast<unsigned char*>(a.out) + int64_t(blockIdx.x) * a.row_bytes;
    if (aligned) {
        const int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x;
        if (i < a.row_bytes / 16)
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
        for (int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x; i < a.row_bytes; i += int64_t(gridDim.y) * kThreads)
            to[i] = from[i];
    }
}

}  // namespace

extern "C" EXPORT int shoal_feed_tokens(const FeedTokensArgs* a) {
    const dim3 grid(unsigned((a->tokens + kThreads - 1) / kThreads));
    return launch("feed_tokens", feed_tokens_kernel, grid, kThreads, 0, a->stream, *a);
}

extern "C" EXPORT int shoal_take_rows(const TakeRowsArgs* a) {
    const auto places = reinterpret_cast<uintptr_t>(a->out) | reinterpret_cast<uintptr_t>(a->x) | uintptr_t(a->row_bytes);
    const dim3 grid(unsigned(a->count), unsigned((a->row_bytes + 16 * kThreads - 1) / (16 * kThreads)));
    return launch("take_rows", take_rows_kernel, grid, kThreads, 0, a->stream, *a, places % 16 == 0);
}
