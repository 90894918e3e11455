// Rows of floats to codes of 12 bits with one scale for each 32 (quantised.h): scale = largest magnitude / 2032, codes are
// rounded to nearest even, and then to multiples of 16, which is 8 bits, in groups without outliers. A group with NaN or
// infinity gets a scale that is not finite, so that what is computed from it is not finite either.
#pragma once

#include "quantised.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

constexpr float kMostCode = 2032.0f;  // 127 · 16: what is rounded to high parts alone keeps to 8 bits
// A group has an outlier where its largest is more than √of times its root mean square, so that its squares are less than
// this. In products of gates and ups outliers are no fixed columns, so more tiles have some, and they matter less.
constexpr int32_t squares_without(int32_t of) { return 127 * 127 * 32 / of; }
constexpr int32_t kPlainSquares = squares_without(20), kPlainSquaresGated = squares_without(28);
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
    const CodeScale scale = code_scale(largest_of(sizes), kMostCode);
    for (int i = 0; i < kGroupVecs; i++) {
        // 12 bits of the codes, which are in bounds in a group that is not finite too.
        const IntVec code = to_codes(x[i], scale) << 20 >> 20;
        store_codes(row.groups[group].high + i * kWidth, code >> 4);
        store_codes(row.low[group] + i * kWidth, code & 15);
    }
    row.groups[group].scale = scale.scale;
}

#if defined(__AVX512F__)
// Some groups at once, whose largest magnitudes are found together: a group's own takes more than all else.
constexpr int kTogether = 8;
constexpr int kTogetherVecs = kTogether * kGroupVecs;

// Of each vector the largest lane: of vectors 0 to 3, again, 4 to 7, again.
INLINE IntVec largest_of_each(const IntVec (&v)[kTogether]) {
    IntVec pairs[4], fours[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i a = (__m512i)v[2 * i], b = (__m512i)v[2 * i + 1];
        pairs[i] = larger((IntVec)_mm512_unpacklo_epi32(a, b), (IntVec)_mm512_unpackhi_epi32(a, b));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512i a = (__m512i)pairs[2 * i], b = (__m512i)pairs[2 * i + 1];
        fours[i] = larger((IntVec)_mm512_unpacklo_epi64(a, b), (IntVec)_mm512_unpackhi_epi64(a, b));
    }
    const __m512i a = (__m512i)fours[0], b = (__m512i)fours[1];
    const IntVec halves = larger((IntVec)_mm512_shuffle_i64x2(a, b, 0x44), (IntVec)_mm512_shuffle_i64x2(a, b, 0xee));
    return larger(halves, (IntVec)_mm512_shuffle_i64x2((__m512i)halves, (__m512i)halves, 0xb1));
}

// As quantise_group, for groups [first, first + kTogether).
INLINE void quantise_groups(const Vec (&x)[kTogetherVecs], const QuantisedRow& row, int64_t first) {
    IntVec sizes[kTogether], codes[kTogetherVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kTogether; i++)
        sizes[i] = larger((IntVec)x[2 * i] & 0x7fffffff, (IntVec)x[2 * i + 1] & 0x7fffffff);
    const Vec largest = (Vec)largest_of_each(sizes);
    const __mmask16 is_some = _mm512_cmp_ps_mask((__m512)largest, _mm512_set1_ps(1e-30f), _CMP_NLT_UQ);
    const __m512 most = _mm512_set1_ps(kMostCode);
    const __m512i in_order = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11);
    const __m512 scales = _mm512_permutexvar_ps(in_order, _mm512_maskz_div_ps(is_some, (__m512)largest, most));
    alignas(64) float inverses[kWidth];
    _mm512_store_ps(inverses, _mm512_permutexvar_ps(in_order, _mm512_maskz_div_ps(is_some, most, (__m512)largest)));
#pragma GCC unroll 16
    for (int i = 0; i < kTogetherVecs; i++) {
        codes[i] = to_codes(x[i], {0.0f, inverses[i / 2]}) << 20 >> 20;
        store_codes(row.groups[first + i / 2].high + i % 2 * kWidth, codes[i] >> 4);
        store_codes(row.low[first + i / 2] + i % 2 * kWidth, codes[i] & 15);
    }
    alignas(64) float each[kWidth];
    _mm512_store_ps(each, scales);
    for (int i = 0; i < kTogether; i++) row.groups[first + i].scale = each[i];
}
#endif

typedef int8_t GroupBytes __attribute__((vector_size(kGroup)));

// Of the 32 high parts the sum of squares.
INLINE int32_t sum_of_squares(const GroupBytes& high) {
#if defined(__AVX2__)
    const __m256i sizes = _mm256_abs_epi8((__m256i)high);
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(sizes, sizes), _mm256_set1_epi16(1));
    const __m128i twos = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    const __m128i pair = _mm_add_epi32(twos, _mm_shuffle_epi32(twos, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
#else
    int32_t sum = 0;
    for (int i = 0; i < kGroup; i++) sum += high[i] * high[i];
    return sum;
#endif
}

struct HalfSums {
    int32_t first, last;
};

// Of the first and of the last 16.
INLINE HalfSums half_sums(const GroupBytes& parts) {
#if defined(__AVX2__)
    const __m256i eights = _mm256_sad_epu8((__m256i)(parts ^ int8_t(0x80)), _mm256_setzero_si256());
    const __m256i halves = _mm256_add_epi64(eights, _mm256_unpackhi_epi64(eights, eights));
    return {_mm_cvtsi128_si32(_mm256_castsi256_si128(halves)) - 16 * 128,
            _mm_cvtsi128_si32(_mm256_extracti128_si256(halves, 1)) - 16 * 128};
#else
    HalfSums sums{0, 0};
    for (int i = 0; i < 16; i++) {
        sums.first += parts[i];
        sums.last += parts[16 + i];
    }
    return sums;
#endif
}

// Rounds codes to multiples of 16, so that low parts are zero, but where an outlier would leave too little of the others; and
// adds up what is left. Only the group itself decides: its row may be one rank's part of a longer one.
INLINE void finish_groups(const QuantisedRow& row, int64_t groups, int32_t plain_squares) {
    for (int64_t group = 0; group < groups; group++) {
        QuantisedGroup& of = row.groups[group];
        GroupBytes high, low;
        __builtin_memcpy(&high, of.high, kGroup);
        __builtin_memcpy(&low, row.low[group], kGroup);
        const int32_t squares = sum_of_squares(high);
        row.wide[group] = squares != 0 && squares < plain_squares;
        HalfSums more{0, 0};
        if (row.wide[group]) {
            more = half_sums(low);
        } else {
            high -= (GroupBytes)(low > 7);
            __builtin_memcpy(of.high, &high, kGroup);
            __builtin_memset(row.low[group], 0, kGroup);
        }
        const HalfSums sums = half_sums(high);
        const int32_t sum = 16 * (sums.first + sums.last) + more.first + more.last;
        of.scaled_sum = of.scale * float(sum);
        of.first_sum = 16 * sums.first + more.first;
        of.sum_8 = 8 * sum;
        of.sum_128 = 128 * sum;
    }
}

// Quantises a row whose elements [i, i + n) are given by element(i, n), n ≤ kWidth, in order; n is less than a
// vector only at the end of the row.
template <typename Element>
INLINE void quantise_row(int64_t inputs, const QuantisedRow& row, Element element, int32_t plain_squares = kPlainSquares) {
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
    finish_groups(row, group, plain_squares);
}

// Writes a row whose elements are given by element(i, n), as quantise_row takes them.
template <typename Element>
INLINE void write_row(float* out, void* quantised, int64_t row, int64_t dim, Element element,
                      int32_t plain_squares = kPlainSquares) {
    const auto write_too = [&](int64_t i, int64_t n) {
        const Vec y = element(i, n);
        if (out) store_n(out + row * dim + i, y, n);
        return y;
    };
    if (quantised)
        quantise_row(dim, QuantisedRow::at(quantised, row, dim), write_too, plain_squares);
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
