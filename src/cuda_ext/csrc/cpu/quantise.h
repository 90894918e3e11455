// Rows of floats to codes of 12 bits with one scale for each 32 (quantised.h): scale = largest magnitude / 2047, codes are
// rounded to nearest even. A group with NaN or infinity gets a scale that is not finite, so that what is computed from it
// is not finite either.
#pragma once

#include "quantised.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

constexpr int kGroupVecs = int(kGroup) / kWidth;

INLINE IntVec larger(IntVec a, IntVec b) { return a > b ? a : b; }

INLINE int32_t largest_of(IntVec v) {
    return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

struct CodeScale {
    float scale, inverse;
};

// bits: those of the largest magnitude, which gets the code ``most``.
INLINE CodeScale code_scale(int32_t bits, float most) {
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    return {largest < 1e-30f ? 0.0f : largest / most, largest < 1e-30f ? 0.0f : most / largest};
}

INLINE IntVec to_codes(Vec x, const CodeScale& scale) {
    const Vec magic = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    return (IntVec)(x * broadcast(scale.inverse) + magic) - 0x4b400000;
}

// x: the group's vectors, zeros beyond the row's end.
INLINE void quantise_group(const Vec (&x)[kGroupVecs], const QuantisedRow& row, int64_t group) {
    IntVec sizes = {};
    for (int i = 0; i < kGroupVecs; i++) sizes = larger(sizes, (IntVec)x[i] & 0x7fffffff);
    const CodeScale scale = code_scale(largest_of(sizes), 2047.0f);
    int32_t half_sums[2] = {0, 0};
    for (int i = 0; i < kGroupVecs; i++) {
        // 12 bits of the codes, which are in bounds in a group that is not finite too.
        const IntVec code = to_codes(x[i], scale) << 20 >> 20;
        store_codes(row.high(group) + i * kWidth, code >> 4);
        store_codes(row.low(group) + i * kWidth, code & 15);
        half_sums[2 * i / kGroupVecs] += fold(code, [](auto a, auto b) { return a + b; });
    }
    row.scales[group] = scale.scale;
    row.scaled_sums[group] = scale.scale * float(half_sums[0] + half_sums[1]);
    row.half_sums[2 * group] = half_sums[0];
    row.half_sums[2 * group + 1] = half_sums[1];
}

// Quantises a row whose elements [i, i + n) are given by element(i, n), n ≤ kWidth, in order; n is less than a
// vector only at the end of the row.
template <typename Element>
INLINE void quantise_row(int64_t inputs, const QuantisedRow& row, Element element) {
    for (int64_t group = 0; group * kGroup < inputs; group++) {
        Vec x[kGroupVecs];
        for (int i = 0; i < kGroupVecs; i++) {
            const int64_t at = group * kGroup + i * kWidth, n = min_of(kWidth, inputs - at);
            x[i] = n > 0 ? element(at, n) : Vec{};
        }
        quantise_group(x, row, group);
    }
}

// Writes a row whose elements are given by element(i, n), as quantise_row takes them.
template <typename Element>
INLINE void write_row(float* out, void* quantised, int64_t row, int64_t dim, Element element) {
    if (quantised)
        quantise_row(dim, QuantisedRow::at(quantised, row, dim), [&](int64_t i, int64_t n) {
            const Vec y = element(i, n);
            if (out) store_n(out + row * dim + i, y, n);
            return y;
        });
    else
        for_each_vec(dim, [&](int64_t i, int64_t n) { store_n(out + row * dim + i, element(i, n), n); });
}

void quantise(const QuantiseArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float* x = a.x + row * a.row_stride;
        quantise_row(a.inputs, QuantisedRow::at(a.quantised, row, a.inputs),
                     [x](int64_t i, int64_t n) { return load_n(x + i, n); });
    }
}

}  // namespace
