// What is done to logits between the head and the draw: a soft cap, biases and penalties, tokens that may not be drawn.
// The arithmetic of biases and penalties is that of workers/sampler.py, to the bit.
#include "launch.h"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) cap_logits_kernel(CapLogitsArgs a) {
    begin_kernel();
    float* logits = a.logits + int64_t(blockIdx.y) * a.row_stride;
    const float cap = float(a.cap);
    const int64_t id = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (id < a.vocabulary) logits[id] = tanhf(logits[id] / cap) * cap;
}

// A block a row: its biases, then the penalties of its tokens.
__global__ void __launch_bounds__(kThreads) adjust_logits_kernel(AdjustLogitsArgs a) {
    begin_kernel();
    const int row = int(blockIdx.x);
    float* logits = a.logits + int64_t(row) * a.row_stride;
    for (int i = a.bias_starts[row] + int(threadIdx.x); i < a.bias_starts[row + 1]; i += kThreads)
        if (a.bias_ids[i] >= 0 && a.bias_ids[i] < a.vocabulary) logits[a.bias_ids[i]] += a.biases[i];
    __syncthreads();
    const float repetition = a.repetition[row], presence = a.presence[row], frequency = a.frequency[row];
    for (int i = a.seen_starts[row] + int(threadIdx.x); i < a.seen_starts[row + 1]; i += kThreads) {
        const int id = a.seen_ids[i];
        if (id < 0 || id >= a.vocabulary) continue;
        const float count = a.seen_counts[i];
        float x = logits[id];
        x = x > 0.0f ? x / repetition : x * repetition;
        x -= frequency * count;
        x -= presence * (count > 0.0f ? 1.0f : 0.0f);
        logits[id] = x;
    }
}

__global__ void __launch_bounds__(kThreads) mask_logits_kernel(MaskLogitsArgs a) {
    begin_kernel();
    const int mask = a.mask_of[blockIdx.y];
    const int64_t id = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (mask < 0 || id >= a.vocabulary) return;
    float& logit = a.logits[blockIdx.y * a.row_stride + id];
    const bool is_strange = logit != logit || logit == INFINITY;  // which the draw is to find
    if (!is_strange && a.masks[mask * a.mask_bytes + id / 8] >> id % 8 & 1) logit = -INFINITY;
}

dim3 grid_of(int64_t vocabulary, int64_t rows) {
    return dim3(unsigned((vocabulary + kThreads - 1) / kThreads), unsigned(rows));
}

}  // namespace

extern "C" EXPORT int shoal_cap_logits(const CapLogitsArgs* a) {
    return launch("cap_logits", cap_logits_kernel, grid_of(a->vocabulary, a->rows), kThreads, 0, a->stream, *a);
}

extern "C" EXPORT int shoal_adjust_logits(const AdjustLogitsArgs* a) {
    return launch("adjust_logits", adjust_logits_kernel, dim3(unsigned(a->rows)), kThreads, 0, a->stream, *a);
}

extern "C" EXPORT int shoal_mask_logits(const MaskLogitsArgs* a) {
    return launch("mask_logits", mask_logits_kernel, grid_of(a->vocabulary, a->rows), kThreads, 0, a->stream, *a);
}
