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

#if defined(__AVX512F__)
// Some groups at once, whose largest magnitudes and sums are found together: a group's own take more than all else.
constexpr int kTogether = 8;
constexpr int kTogetherVecs = kTogether * kGroupVecs;

// Of each vector its lanes joined, in the order of the vectors; of 8 vectors the lanes are 0 to 3, again, 4 to 7, again.
template <int Count, typename Join>
INLINE IntVec fold_together(const IntVec (&v)[Count], Join join) {
    IntVec pairs[Count / 2], fours[Count / 4], halves[Count / 8];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; i++) {
        const __m512i a = (__m512i)v[2 * i], b = (__m512i)v[2 * i + 1];
        pairs[i] = join((IntVec)_mm512_unpacklo_epi32(a, b), (IntVec)_mm512_unpackhi_epi32(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < Count / 4; i++) {
        const __m512i a = (__m512i)pairs[2 * i], b = (__m512i)pairs[2 * i + 1];
        fours[i] = join((IntVec)_mm512_unpacklo_epi64(a, b), (IntVec)_mm512_unpackhi_epi64(a, b));
    }
#pragma GCC unroll 2
    for (int i = 0; i < Count / 8; i++) {
        const __m512i a = (__m512i)fours[2 * i], b = (__m512i)fours[2 * i + 1];
        halves[i] = join((IntVec)_mm512_shuffle_i64x2(a, b, 0x44), (IntVec)_mm512_shuffle_i64x2(a, b, 0xee));
    }
    const __m512i first = (__m512i)halves[0], last = (__m512i)halves[Count / 8 - 1];
    if constexpr (Count == 8) return join(halves[0], (IntVec)_mm512_shuffle_i64x2(first, first, 0xb1));
    return join((IntVec)_mm512_shuffle_i64x2(first, last, 0x88), (IntVec)_mm512_shuffle_i64x2(first, last, 0xdd));
}

// As quantise_group, for groups [first, first + kTogether).
INLINE void quantise_groups(const Vec (&x)[kTogetherVecs], const QuantisedRow& row, int64_t first) {
    IntVec sizes[kTogether], codes[kTogetherVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kTogether; i++)
        sizes[i] = larger((IntVec)x[2 * i] & 0x7fffffff, (IntVec)x[2 * i + 1] & 0x7fffffff);
    const Vec largest = (Vec)fold_together(sizes, larger);
    const __mmask16 is_some = _mm512_cmp_ps_mask((__m512)largest, _mm512_set1_ps(1e-30f), _CMP_NLT_UQ);
    const __m512 most = _mm512_set1_ps(2047.0f);
    const __m512i in_order = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11);
    const __m512 scales = _mm512_permutexvar_ps(in_order, _mm512_maskz_div_ps(is_some, (__m512)largest, most));
    alignas(64) float inverses[kWidth];
    _mm512_store_ps(inverses, _mm512_permutexvar_ps(in_order, _mm512_maskz_div_ps(is_some, most, (__m512)largest)));
#pragma GCC unroll 16
    for (int i = 0; i < kTogetherVecs; i++) {
        codes[i] = to_codes(x[i], {0.0f, inverses[i / 2]}) << 20 >> 20;
        int8_t* to = row.high(first + i / 2) + i % 2 * kWidth;
        store_codes(to, codes[i] >> 4);
        store_codes(to + kGroup, codes[i] & 15);
    }
    const __m512i half_sums = (__m512i)fold_together(codes, [](IntVec a, IntVec b) { return a + b; });
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i sums = _mm512_add_epi32(_mm512_permutexvar_epi32(evens, half_sums), _mm512_permutexvar_epi32(odds, half_sums));
    _mm512_storeu_si512(row.half_sums + 2 * first, half_sums);
    _mm256_storeu_ps(row.scales + first, _mm512_castps512_ps256(scales));
    _mm256_storeu_ps(row.scaled_sums + first, _mm512_castps512_ps256(_mm512_mul_ps(scales, _mm512_cvtepi32_ps(sums))));
}
#endif

// Quantises a row whose elements [i, i + n) are given by element(i, n), n ≤ kWidth, in order; n is less than a
// vector only at the end of the row.
template <typename Element>
INLINE void quantise_row(int64_t inputs, const QuantisedRow& row, Element element) {
    int64_t group = 0;
#if defined(__AVX512F__)
    for (; (group + kTogether) * kGroup <= inputs; group += kTogether) {
        Vec x[kTogetherVecs];
#pragma GCC unroll 16
        for (int i = 0; i < kTogetherVecs; i++) x[i] = element(group * kGroup + i * kWidth, kWidth);
        quantise_groups(x, row, group);
    }
#endif
    for (; group * kGroup < inputs; group++) {
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
