// What the rows of linear_quantised bring besides their codes, laid out as tiles take it.
#pragma once

#include "linear_plan.h"
#include "quantised.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

constexpr int64_t kFetchAhead = 2048;  // bytes of weights that are asked of the memory before they are needed

// For each block of inputs the rows' scales, scale · sum, and format.zero() · sum of codes, side by side.
struct Factors {
    float* scales;
    float* scaled_sums;
    int32_t* zero_sums;

    INLINE Factors after(int64_t count) const { return {scales + count, scaled_sums + count, zero_sums + count}; }
};

struct FactorMemory {
    float scales[kMostFactors], scaled_sums[kMostFactors];
    int32_t zero_sums[kMostFactors];

    INLINE Factors from(int64_t at) { return {scales + at, scaled_sums + at, zero_sums + at}; }
};

INLINE FactorMemory& factor_memory() {
    static thread_local FactorMemory memory;
    return memory;
}

// The factors of ``count`` rows from ``first`` on.
template <int Group>
INLINE void lay_factors(const QuantisedLinearArgs& a, int64_t first, int64_t count, const Factors& into) {
    const int64_t groups = QuantisedRow::groups(a.inputs) * kGroup / Group;
    const int zero = WeightFormat{a.bits, Group, a.has_offset != 0}.zero();
    for (int64_t r = 0; r < count; r++) {
        const QuantisedRow row = QuantisedRow::at(a.x, first + r, a.inputs);
        for (int64_t group = 0; group < groups; group++) {
            const int64_t at = group * count + r, x_group = group * Group / kGroup;
            const int32_t* half_sums = row.half_sums + group * Group / 16;
            into.scales[at] = row.scales[x_group];
            into.zero_sums[at] = zero * (Group == 16 ? half_sums[0] : half_sums[0] + half_sums[1]);
            into.scaled_sums[at] = Group == 16 ? row.scales[x_group] * float(half_sums[0]) : row.scaled_sums[x_group];
        }
    }
}

}  // namespace
