// Drawing one token a row: temperature, top-k, top-p, min-p, then the inverse of the distribution function at the row's
// uniform number, over the kept tokens in order of their ids. A block a row.
//
// Nothing is sorted. The worst kept token is found by radix selection: a weight's bits order it, so a histogram of their
// first ten, of the next ten among those that share the first, and of the last ten lead to it. Masses are integers, in
// units of 2^-44 of the best token's weight: added in any order they come to the same.
#include "launch.h"

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kDigitBits = 10;
constexpr int kBins = 1 << kDigitBits;  // two a thread

using Mass = unsigned long long;
constexpr float kUnits = 0x1p44f;

struct Shared {
    unsigned counts[kBins];
    Mass masses[kBins];
    Mass warp_counts[kWarps], warp_masses[kWarps];
    float warp_values[kWarps];
    int warp_ids[kWarps];
    // what one thread found for all
    uint32_t digit;
    Mass count, mass;
    int id;
};

struct Weighing {
    const float* logits;
    int vocabulary;
    float peak, temperature;
    __device__ __forceinline__ float of(int id) const {
        return exp_two((logits[id] - peak) / temperature * kLog2E);
    }
};

__device__ __forceinline__ uint32_t key_of(float weight) { return bits_of(weight); }
__device__ __forceinline__ Mass mass_of(float weight) { return Mass(weight * kUnits); }

// The worst kept token: weights above that of ``key``, and those of it up to ``last_id``.
struct Boundary {
    uint32_t key;
    int last_id;
    Mass mass;  // of all that is kept
    __device__ __forceinline__ bool keeps(float weight, int id) const {
        return key_of(weight) > key || (key_of(weight) == key && id <= last_id);
    }
};

struct Peak {
    float value;
    int id;
};

__device__ __forceinline__ Peak better(Peak a, Peak b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// id -1 where a logit is NaN or +inf, or none is above -inf.
__device__ Peak find_peak(const float* logits, int vocabulary, Shared& shared) {
    Peak best = {-INFINITY, vocabulary};
    bool is_strange = false;
    for (int id = int(threadIdx.x); id < vocabulary; id += kThreads) {
        const float x = logits[id];
        is_strange |= x != x || x == INFINITY;
        best = better(best, {x, id});
    }
    if (is_strange) best = {INFINITY, -1};
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
        best = better(best, {__shfl_xor_sync(kAllLanes, best.value, mask), __shfl_xor_sync(kAllLanes, best.id, mask)});
    if (threadIdx.x % kWarpSize == 0) {
        shared.warp_values[threadIdx.x / kWarpSize] = best.value;
        shared.warp_ids[threadIdx.x / kWarpSize] = best.id;
    }
    __syncthreads();
    for (int warp = 0; warp < kWarps; warp++) best = better(best, {shared.warp_values[warp], shared.warp_ids[warp]});
    __syncthreads();
    return {best.value, best.value == -INFINITY ? -1 : best.id};
}

// mine, and that of all lanes before.
__device__ __forceinline__ Mass sum_up_to(Mass mine) {
    const int lane = int(threadIdx.x) % kWarpSize;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const Mass before = __shfl_up_sync(kAllLanes, mine, distance);
        if (lane >= distance) mine += before;
    }
    return mine;
}

// The sums of value(id) over each warp's stretch of ids, and of all.
template <typename Value>
__device__ Mass sum_stretches(int vocabulary, Shared& shared, const Value& value) {
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    const int stretch = (vocabulary + kWarps - 1) / kWarps;
    const int end = (warp + 1) * stretch < vocabulary ? (warp + 1) * stretch : vocabulary;
    Mass sum = 0;
    for (int id = warp * stretch + lane; id < end; id += kWarpSize) sum += value(id);
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    if (lane == 0) shared.warp_masses[warp] = sum;
    __syncthreads();
    Mass total = 0;
    for (int i = 0; i < kWarps; i++) total += shared.warp_masses[i];
    return total;
}

// The id at which the sum of value(id), in order of ids, reaches ``goal``. After sum_stretches of the same value.
template <typename Value>
__device__ int reach(int vocabulary, Shared& shared, Mass goal, const Value& value) {
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    const int stretch = (vocabulary + kWarps - 1) / kWarps;
    Mass before = 0;
    for (int i = 0; i < warp; i++) before += shared.warp_masses[i];
    if (before < goal && before + shared.warp_masses[warp] >= goal) {
        const int end = (warp + 1) * stretch < vocabulary ? (warp + 1) * stretch : vocabulary;
        for (int first = warp * stretch; first < end; first += kWarpSize) {
            const Mass here = before + sum_up_to(first + lane < end ? value(first + lane) : 0);
            const uint32_t reached = __ballot_sync(kAllLanes, here >= goal);
            if (reached) {
                if (lane == 0) shared.id = first + __ffs(reached) - 1;
                break;
            }
            before = __shfl_sync(kAllLanes, here, kWarpSize - 1);
        }
    }
    __syncthreads();
    const int id = shared.id;
    __syncthreads();
    return id;
}

// Fills the histogram of the digit at ``shift`` of the keys that begin with ``prefix``.
__device__ void count_digits(const Weighing& weights, uint32_t prefix, int shift, Shared& shared) {
    for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) {
        shared.counts[bin] = 0;
        shared.masses[bin] = 0;
    }
    __syncthreads();
    for (int id = int(threadIdx.x); id < weights.vocabulary; id += kThreads) {
        const float weight = weights.of(id);
        const uint32_t digits = key_of(weight) >> shift;
        if (digits >> kDigitBits != prefix) continue;
        atomicAdd(&shared.counts[digits % kBins], 1u);
        atomicAdd(&shared.masses[digits % kBins], mass_of(weight));
    }
    __syncthreads();
}

// The bin, from the highest on, at which what lies above and in it reaches the goal, of count or of mass; then count and
// mass are what lies above it.
__device__ void find_digit(bool by_mass, Mass goal, Mass& count, Mass& mass, uint32_t& digit, Shared& shared) {
    const int warp = int(threadIdx.x) / kWarpSize, high = kBins - 1 - 2 * int(threadIdx.x), low = high - 1;
    const Mass counts = shared.counts[high] + shared.counts[low], masses = shared.masses[high] + shared.masses[low];
    Mass count_to = sum_up_to(counts), mass_to = sum_up_to(masses);
    if (threadIdx.x % kWarpSize == kWarpSize - 1) {
        shared.warp_counts[warp] = count_to;
        shared.warp_masses[warp] = mass_to;
    }
    __syncthreads();
    for (int i = 0; i < warp; i++) {
        count_to += shared.warp_counts[i];
        mass_to += shared.warp_masses[i];
    }
    Mass above_count = count + count_to - counts, above_mass = mass + mass_to - masses;
    const Mass above = by_mass ? above_mass : above_count, here = by_mass ? masses : counts;
    if (above < goal && above + here >= goal) {
        const Mass first = by_mass ? shared.masses[high] : shared.counts[high];
        const bool is_low = above + first < goal;
        shared.digit = uint32_t(is_low ? low : high);
        shared.count = above_count + (is_low ? shared.counts[high] : 0);
        shared.mass = above_mass + (is_low ? shared.masses[high] : 0);
    }
    __syncthreads();
    digit = shared.digit;
    count = shared.count;
    mass = shared.mass;
    __syncthreads();
}

// Of the best tokens that are ``goal`` many, or that weigh so much; no more than there is.
__device__ Boundary find_boundary(const Weighing& weights, bool by_mass, Mass goal, Shared& shared) {
    uint32_t key = 0, digit = 0;
    Mass count = 0, mass = 0;
    for (int shift = 2 * kDigitBits; shift >= 0; shift -= kDigitBits) {
        count_digits(weights, key, shift, shared);
        find_digit(by_mass, goal, count, mass, digit, shared);
        key = key << kDigitBits | digit;
    }
    const Mass each = mass_of(float_of(key));
    const Mass equals = by_mass ? (goal - mass + each - 1) / each : goal - count;
    const auto is_equal = [&](int id) { return Mass(key_of(weights.of(id)) == key); };
    sum_stretches(weights.vocabulary, shared, is_equal);
    const int last_id = reach(weights.vocabulary, shared, equals, is_equal);
    return {key, last_id, mass + equals * each};
}

__device__ Mass share_of(Mass whole, double share) {
    const auto part = Mass(ceil(double(whole) * share));
    return part < 1 ? 1 : part > whole ? whole : part;
}

__device__ int draw_token(const DrawArgs& a, int row, Shared& shared) {
    const float* logits = a.logits + row * a.row_stride;
    const int vocabulary = int(a.vocabulary);
    const Peak peak = find_peak(logits, vocabulary, shared);
    if (peak.id < 0 || a.temperature[row] == 0.0f) return peak.id;

    const Weighing weights{logits, vocabulary, peak.value, fmaxf(a.temperature[row], 1e-10f)};
    const int64_t top_k = a.top_k[row];
    const float top_p = a.top_p[row], least = fminf(a.min_p[row], 1.0f);
    Boundary boundary = {0, vocabulary, 0};
    if (top_k > 0 && top_k < vocabulary) boundary = find_boundary(weights, false, Mass(top_k), shared);
    if (top_p < 1.0f) {
        const auto mass = [&](int id) { return mass_of(weights.of(id)); };
        const Mass whole = boundary.mass ? boundary.mass : sum_stretches(vocabulary, shared, mass);
        boundary = find_boundary(weights, true, share_of(whole, double(top_p)), shared);
    }
    const auto kept = [&](int id) {
        const float weight = weights.of(id);
        return boundary.keeps(weight, id) && weight >= least ? mass_of(weight) : Mass(0);
    };
    const Mass total = sum_stretches(vocabulary, shared, kept);
    const auto passed = Mass(double(total) * a.uniform[row]);
    return reach(vocabulary, shared, passed < total ? passed + 1 : total, kept);
}

__global__ void __launch_bounds__(kThreads) draw_kernel(DrawArgs a) {
    __shared__ Shared shared;
    const int row = int(blockIdx.x), id = draw_token(a, row, shared);
    if (threadIdx.x == 0) a.ids[row] = id;
}

}  // namespace

extern "C" EXPORT int shoal_draw(const DrawArgs* a) {
    return launch("draw", draw_kernel, dim3(unsigned(a->rows)), kThreads, 0, a->stream, *a);
}
