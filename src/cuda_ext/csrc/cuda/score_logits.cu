// What log-probabilities are made of, so that no row of logits has to leave the device: the logarithm of the sum of
// exponentials, the best ids, and the logit of the id that was drawn. Sums are of doubles, in an order that depends on the
// number of logits alone.
#include "launch.h"

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

struct Candidate {
    float value;
    int id;
};

__device__ __forceinline__ bool is_before(Candidate a, Candidate b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The best of those that come after ``last``; an id of ``vocabulary`` where there is none above -inf. Every thread calls.
__device__ Candidate next_best(const float* logits, int vocabulary, Candidate last, Candidate* parts) {
    Candidate best = {-INFINITY, vocabulary};
    for (int id = int(threadIdx.x); id < vocabulary; id += kThreads) {
        const Candidate here = {logits[id], id};
        if (is_before(last, here) && is_before(here, best)) best = here;
    }
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
        const Candidate other = {__shfl_xor_sync(kAllLanes, best.value, mask), __shfl_xor_sync(kAllLanes, best.id, mask)};
        if (is_before(other, best)) best = other;
    }
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = best;
    __syncthreads();
    for (int warp = 0; warp < kWarps; warp++)
        if (is_before(parts[warp], best)) best = parts[warp];
    __syncthreads();
    return best.value == -INFINITY ? Candidate{-INFINITY, vocabulary} : best;
}

// Of exp(logit - peak).
__device__ double sum_exponentials(const float* logits, int vocabulary, float peak, double* parts) {
    double sum = 0;
    for (int id = int(threadIdx.x); id < vocabulary; id += kThreads) sum += double(expf(logits[id] - peak));
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < kWarps; warp++) sum += parts[warp];
    return sum;
}

// A block a row.
__global__ void __launch_bounds__(kThreads) score_logits_kernel(ScoreLogitsArgs a) {
    __shared__ Candidate candidates[kWarps];
    __shared__ double sums[kWarps];
    const int64_t place = blockIdx.x, row = a.rows[place];
    if (row < 0 || row >= a.logits_rows) return;
    const float* logits = a.logits + row * a.row_stride;
    const int vocabulary = int(a.vocabulary), top = int(a.tops[place] < a.width ? a.tops[place] : a.width);
    Candidate best = next_best(logits, vocabulary, {INFINITY, -1}, candidates);
    const double sum = sum_exponentials(logits, vocabulary, best.value, sums);
    if (threadIdx.x == 0) a.totals[place] = log(sum) + double(best.value);
    for (int n = 0; n < top; n++) {
        if (threadIdx.x == 0) {
            a.top_ids[place * a.width + n] = best.id < vocabulary ? best.id : -1;
            a.top_values[place * a.width + n] = best.value;
        }
        if (n + 1 < top) best = next_best(logits, vocabulary, best, candidates);
    }
}

__global__ void __launch_bounds__(kThreads) pick_logits_kernel(PickLogitsArgs a) {
    const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (place >= a.count) return;
    const int64_t row = a.rows[place];
    if (row < 0 || row >= a.logits_rows) return;
    const int64_t id = a.ids[row];
    if (id >= 0 && id < a.vocabulary) a.values[place] = a.logits[row * a.row_stride + id];
}

}  // namespace

extern "C" EXPORT int shoal_score_logits(const ScoreLogitsArgs* a) {
    return launch("score_logits", score_logits_kernel, dim3(unsigned(a->count)), kThreads, 0, a->stream, *a);
}

extern "C" EXPORT int shoal_pick_logits(const PickLogitsArgs* a) {
    const dim3 grid(unsigned((a->count + kThreads - 1) / kThreads));
    return launch("pick_logits", pick_logits_kernel, grid, kThreads, 0, a->stream, *a);
}
