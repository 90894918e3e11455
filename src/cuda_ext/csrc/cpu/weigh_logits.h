// The passes over a row of logits that drawing a token needs: its peak, its weights, the heavy ones of them.
#pragma once

#include "draw_plan.h"
#include "vec.h"

namespace {

// The greatest logit, NaN where one is NaN, and its first place where it is finite.
Peak find_peak(const float* logits, int64_t count) {
    const float low = -__builtin_inff();
    Vec peaks = broadcast(low);
    IntVec strange = {};
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const Vec v = load(logits + i);
        peaks = max_vec(peaks, v);
        strange |= (IntVec)(v != v);
    }
    float best = max_of_lanes(peaks);
    bool is_nan = false;
    for (int lane = 0; lane < kWidth; lane++) is_nan |= strange[lane] != 0;
    for (; i < count; i++) {
        is_nan |= logits[i] != logits[i];
        best = logits[i] > best ? logits[i] : best;
    }
    if (is_nan || best == -low || best == low) return {best, -1};
    for (i = 0; logits[i] != best; i++) {
    }
    return {best, i};
}

// weights[i] = exp((logits[i] - peak) / temperature); sums of each kDrawBlock of them, in one order.
void weigh_logits(const float* logits, int64_t count, float peak, float temperature, float* weights, double* sums) {
    for (int64_t begin = 0; begin < count; begin += kDrawBlock) {
        const int64_t end = min_of(begin + kDrawBlock, count);
        Vec sum = {};
        for_each_vec(end - begin, [&](int64_t i, int64_t n) {
            Vec weight = exp_vec((load_n(logits + begin + i, n) - peak) / temperature);
            if (n < kWidth)
                for (int64_t lane = n; lane < kWidth; lane++) weight[lane] = 0.0f;
            store_n(weights + begin + i, weight, n);
            sum += weight;
        });
        sums[begin / kDrawBlock] = double(sum_of(sum));
    }
}

// The tokens of at least ``threshold``, in order of their ids; returns how many.
int64_t collect(const float* weights, int64_t count, float threshold, Candidate* into) {
    int64_t found = 0;
    for (int64_t begin = 0; begin < count; begin += kWidth) {
        const int64_t end = min_of(begin + kWidth, count);
        if (begin + kWidth <= count && !any_at_least(load(weights + begin), threshold)) continue;
        for (int64_t i = begin; i < end; i++) {  // without a branch: found ≤ i, so there is room
            into[found] = {weights[i], int32_t(i)};
            found += weights[i] >= threshold;
        }
    }
    return found;
}

}  // namespace
