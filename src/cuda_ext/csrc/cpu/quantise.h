// Rows of floats to codes of 8 bits with one scale for each 32 (quantised.h): scale = largest magnitude / 127, codes are
// rounded to nearest even, and outliers lie apart. A group with NaN or infinity gets a scale that is not finite, so that what
// is computed from it is not finite either.
#pragma once

#include "quantised.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

constexpr float kMostCode = 127.0f;
// A group has an outlier where its largest is more than √of times its root mean square, so that its codes' squares add up to
// less than this. Only the group itself decides: its row may be one rank's part of a longer one. Outliers in products of
// gates and ups matter less.
constexpr int32_t squares_without(int32_t of) { return 127 * 127 * 32 / of; }
constexpr int32_t kPlainSquares = squares_without(16), kPlainSquaresGated = squares_without(28);
constexpr int kGroupVecs = int(kGroup) / kWidth;

INLINE IntVec larger(IntVec a, IntVec b) { return a > b ? a : b; }

INLINE IntVec size_bits(Vec x) { return (IntVec)x & 0x7fffffff; }

INLINE int32_t largest_of(IntVec v) {
    return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

INLINE int32_t total_of(IntVec v) {
    return fold(v, [](auto a, auto b) { return a + b; });
}

struct CodeScale {
    float scale, inverse;
};

// bits: those of the largest magnitude, which gets the code kMostCode.
INLINE CodeScale code_scale(int32_t bits) {
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    return {largest < 1e-30f ? 0.0f : largest / kMostCode, largest < 1e-30f ? 0.0f : kMostCode / largest};
}

constexpr float kToInteger = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, which the lowest bits hold
constexpr int32_t kIntegerZero = 0x4b400000;

INLINE IntVec to_codes(Vec x, const CodeScale& scale) {
    return (IntVec)(x * broadcast(scale.inverse) + broadcast(kToInteger)) - kIntegerZero;
}

INLINE void set_sums(QuantisedGroup& of, float scaled_sum, int32_t first_sum, int32_t sum) {
    of.scaled_sum = scaled_sum;
    of.first_sum = first_sum;
    of.sum_8 = 8 * sum;
    of.sum_128 = 128 * sum;
}

struct Encoded {
    int32_t largest;  // its bits
    int32_t squares;  // the sum of the codes'
};

// x: the group's vectors, zeros beyond the row's end.
INLINE Encoded encode_group(const Vec (&x)[kGroupVecs], QuantisedGroup& of) {
    IntVec sizes = {};
    for (int i = 0; i < kGroupVecs; i++) sizes = larger(sizes, size_bits(x[i]));
    const int32_t largest = largest_of(sizes);
    const CodeScale scale = code_scale(largest);
    IntVec halves[2] = {}, squares = {};
    for (int i = 0; i < kGroupVecs; i++) {
        const IntVec codes = to_codes(x[i], scale) << 24 >> 24;  // in bounds in a group that is not finite too
        store_codes(of.codes + i * kWidth, codes);
        halves[i * kWidth / 16] += codes;
        squares += codes * codes;
    }
    const int32_t first_sum = total_of(halves[0]), sum = first_sum + total_of(halves[1]);
    of.scale = scale.scale;
    set_sums(of, scale.scale * float(sum), first_sum, sum);
    return {largest, total_of(squares)};
}

// Which of the group's 32 have these bits.
INLINE uint32_t lanes_with(const Vec* x, int32_t size) {
    uint32_t lanes = 0;
    for (int i = 0; i < kGroupVecs; i++) {
        const IntVec is_it = size_bits(x[i]) == size;
#if defined(__AVX512F__)
        lanes |= uint32_t(_mm512_movepi32_mask((__m512i)is_it)) << i * kWidth;
#elif defined(__AVX2__)
        lanes |= uint32_t(_mm256_movemask_ps((__m256)is_it)) << i * kWidth;
#else
        for (int j = 0; j < kWidth; j++) lanes |= uint32_t(is_it[j] & 1) << (i * kWidth + j);
#endif
    }
    return lanes;
}

// Puts a group's largest apart, the first of several, and encodes the others. x: as encode_group has it.
INLINE void take_outlier(const Vec* x, int32_t largest, const QuantisedRow& row, int64_t group) {
    const int place = __builtin_ctz(lanes_with(x, largest));
    row.outliers[group] = reinterpret_cast<const float*>(x)[place];
    row.places[group] = uint8_t(place);
    Vec others[kGroupVecs];
    for (int i = 0; i < kGroupVecs; i++) {
        IntVec index;
        for (int j = 0; j < kWidth; j++) index[j] = i * kWidth + j;
        others[i] = (Vec)((IntVec)x[i] & (IntVec)(index != place));
    }
    encode_group(others, row.groups[group]);
}

#if defined(__AVX512F__)
// Some groups at once, whose lanes are joined together: a group's own takes more than all else.
constexpr int kTogether = 8;
constexpr int kTogetherVecs = kTogether * kGroupVecs;

// Lanes 0 to 7: each vector's lanes joined.
template <typename Vector, typename Join>
INLINE Vector fold_each(const Vector (&v)[kTogether], Join join) {
    Vector pairs[4], fours[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i a = (__m512i)v[2 * i], b = (__m512i)v[2 * i + 1];
        pairs[i] = join((Vector)_mm512_unpacklo_epi32(a, b), (Vector)_mm512_unpackhi_epi32(a, b));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512i a = (__m512i)pairs[2 * i], b = (__m512i)pairs[2 * i + 1];
        fours[i] = join((Vector)_mm512_unpacklo_epi64(a, b), (Vector)_mm512_unpackhi_epi64(a, b));
    }
    const __m512i a = (__m512i)fours[0], b = (__m512i)fours[1];
    const Vector halves = join((Vector)_mm512_shuffle_i64x2(a, b, 0x44), (Vector)_mm512_shuffle_i64x2(a, b, 0xee));
    const Vector all = join(halves, (Vector)_mm512_shuffle_i64x2((__m512i)halves, (__m512i)halves, 0xb1));
    return (Vector)_mm512_shuffle_i64x2((__m512i)all, (__m512i)all, 0x08);
}

// As encode_group for each of them, with their largest; returns whose squares add up to less than plain_squares.
INLINE uint32_t encode_groups(const Vec (&x)[kTogetherVecs], QuantisedGroup* of, int32_t plain_squares, IntVec& largest_bits) {
    IntVec sizes[kTogether];
#pragma GCC unroll 8
    for (int i = 0; i < kTogether; i++) sizes[i] = larger(size_bits(x[2 * i]), size_bits(x[2 * i + 1]));
    const auto most_of = [](IntVec a, IntVec b) { return larger(a, b); };
    largest_bits = fold_each(sizes, most_of);
    const __m512 largest = (__m512)largest_bits, most = _mm512_set1_ps(kMostCode);
    const __mmask16 is_some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e-30f), _CMP_NLT_UQ);
    const Vec scales = (Vec)_mm512_maskz_div_ps(is_some, largest, most);
    float inverses[kWidth];
    _mm512_storeu_ps(inverses, _mm512_maskz_div_ps(is_some, most, largest));
    BitVec first[kTogether], both[kTogether];
    Vec squares[kTogether];
#pragma GCC unroll 8
    for (int i = 0; i < kTogether; i++) {
        const Vec inverse = broadcast(inverses[i]), to_integer = broadcast(kToInteger);
        const Vec a = x[2 * i] * inverse + to_integer, b = x[2 * i + 1] * inverse + to_integer;
        store_codes(of[i].codes, (IntVec)a);
        store_codes(of[i].codes + kWidth, (IntVec)b);
        first[i] = (BitVec)a;
        both[i] = (BitVec)a + (BitVec)b;
        const Vec first_codes = a - to_integer, last_codes = b - to_integer;
        squares[i] = fma(last_codes, last_codes, first_codes * first_codes);
    }
    const auto sum = [](auto a, auto b) { return a + b; };
    const BitVec first_sums = fold_each(first, sum) - kWidth * uint32_t(kIntegerZero);
    const BitVec sums = fold_each(both, sum) - 2 * kWidth * uint32_t(kIntegerZero);
    const Vec scaled_sums = scales * __builtin_convertvector((IntVec)sums, Vec);
    for (int i = 0; i < kTogether; i++) {
        of[i].scale = scales[i];
        set_sums(of[i], scaled_sums[i], int32_t(first_sums[i]), int32_t(sums[i]));
    }
    const __m512 all = (__m512)fold_each(squares, sum);  // whole numbers below 2^24
    const uint32_t are_small = _mm512_cmp_ps_mask(all, _mm512_set1_ps(float(plain_squares)), _CMP_LT_OQ);
    return are_small & _mm512_cmp_ps_mask(all, _mm512_setzero_ps(), _CMP_GT_OQ) & ((1 << kTogether) - 1);
}
#endif

// Quantises a row whose elements [i, i + n) are given by element(i, n), n ≤ kWidth, in order; n is less than a
// vector only at the end of the row.
template <typename Element>
INLINE void quantise_row(int64_t inputs, const QuantisedRow& row, Element element, int32_t plain_squares = kPlainSquares) {
    __builtin_memset(row.places, kNoOutlier, QuantisedRow::place_count(inputs));
    int64_t group = 0;
#if defined(__AVX512F__)
    for (; (group + kTogether) * kGroup <= inputs; group += kTogether) {
        Vec x[kTogetherVecs];
#pragma GCC unroll 16
        for (int i = 0; i < kTogetherVecs; i++) x[i] = element(group * kGroup + i * kWidth, kWidth);
        IntVec largest;
        for (uint32_t left = encode_groups(x, row.groups + group, plain_squares, largest); left; left &= left - 1) {
            const int of = __builtin_ctz(left);
            take_outlier(x + of * kGroupVecs, largest[of], row, group + of);
        }
    }
#endif
    for (; group * kGroup < inputs; group++) {
        Vec x[kGroupVecs];
        for (int i = 0; i < kGroupVecs; i++) {
            const int64_t at = group * kGroup + i * kWidth, n = min_of(kWidth, inputs - at);
            x[i] = n > 0 ? element(at, n) : Vec{};
        }
        const auto [largest, squares] = encode_group(x, row.groups[group]);
        if (squares > 0 && squares < plain_squares) take_outlier(x, largest, row, group);
    }
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
