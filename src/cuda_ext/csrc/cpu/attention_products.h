// The products of paged attention on vectors: a few rows of queries or weights against keys or values of a tile of positions.
// Included by paged_attention.h.
#pragma once

#include "attention_walk.h"
#include "transpose.h"
#include "vec.h"

namespace {

constexpr int kRowsAtOnce = 6;
constexpr int kVecsAtOnce = kWidth == 16 ? 4 : 2;  // 6 × 4 of 32 registers, or 6 × 2 of 16

// --- keys: positions × dim → dim × positions, by groups of kWidth positions ---

template <typename Cache>
INLINE void transpose_piece(const Cache* const* keys, int64_t dim, int64_t d, float* columns) {
    const int64_t n = min_of(kWidth, dim - d);
    Vec v[kWidth];
    for (int i = 0; i < kWidth; i++) v[i] = load_cached(keys[i], dim, d, n);
    transpose(v);
    for (int i = 0; i < n; i++) store(columns + (d + i) * kWidth, v[i]);
}

// Two bfloat16 at a time: they travel through the transposition as one 32-bit element.
INLINE void transpose_pairs(const bf16* const* keys, int64_t d, float* columns) {
    Vec v[kWidth];
    for (int i = 0; i < kWidth; i++) __builtin_memcpy(&v[i], keys[i] + d, sizeof v[i]);
    transpose(v);
    for (int i = 0; i < kWidth; i++) {
        store(columns + (d + 2 * i) * kWidth, (Vec)((BitVec)v[i] << 16));
        store(columns + (d + 2 * i + 1) * kWidth, (Vec)((BitVec)v[i] & 0xffff0000));
    }
}

INLINE int64_t transpose_paired(const float* const*, int64_t, float*) { return 0; }
INLINE int64_t transpose_paired(const int8_t* const*, int64_t, float*) { return 0; }

INLINE int64_t transpose_paired(const bf16* const* keys, int64_t dim, float* columns) {
    int64_t d = 0;
    for (; d + 2 * kWidth <= dim; d += 2 * kWidth) transpose_pairs(keys, d, columns);
    return d;
}

template <typename Cache>
void transpose_keys(const Cache* const* keys, int64_t first, int64_t last, int64_t dim, float* columns,
                    TilesAhead<Cache>& ahead) {
    for (int64_t j = first / kWidth * kWidth; j < last; j += kWidth) {
        ahead.go_on(kWidth * kKeysShare);
        float* group = columns + j * dim;
        for (int64_t d = transpose_paired(keys + j, dim, group); d < dim; d += kWidth)
            transpose_piece(keys + j, dim, d, group);
    }
}

// What a word of 32 bits holds, a float or two numbers in bfloat16, and how two vectors of them are multiplied and added.
struct OneFloat {
    static INLINE Vec add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct TwoNarrow {
    static INLINE Vec add(Vec a, Vec b, Vec sum) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// --- scores[row][position] = q[row] · key[position]; rows of q have ``words`` words ---

// Where each kWidth keys of a tile begin, each as ``words`` vectors.
struct KeyGroups {
    const float* at[kTile / kWidth];
};

template <typename Word, int Rows, int Vecs>
INLINE void score_block(const float* q, const float* const* groups, int64_t words, float* scores) {
    Vec sums[Rows][Vecs] = {};
    for (int64_t d = 0; d < words; d++) {
        Vec key[Vecs];
        for (int v = 0; v < Vecs; v++) key[v] = load(groups[v] + d * kWidth);
        for (int r = 0; r < Rows; r++) {
            const Vec element = (Vec)broadcast_word(q + r * words + d);
            for (int v = 0; v < Vecs; v++) sums[r][v] = Word::add(element, key[v], sums[r][v]);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vecs; v++) store(scores + r * kTile + v * kWidth, sums[r][v]);
}

template <typename Word, int Rows>
void score_rows(const float* q, const KeyGroups& keys, int64_t words, int64_t first, int64_t last, float* scores) {
    int64_t j = first / kWidth * kWidth;
    for (; j + kVecsAtOnce * kWidth <= round_up(last, kWidth); j += kVecsAtOnce * kWidth)
        score_block<Word, Rows, kVecsAtOnce>(q, keys.at + j / kWidth, words, scores + j);
    for (; j < last; j += kWidth) score_block<Word, Rows, 1>(q, keys.at + j / kWidth, words, scores + j);
}

// --- sums[row] += weights[row][position] · value[position], over positions, or pairs of them, [first, last) ---

template <typename Word, int Rows, int Vecs, typename Value, typename Cache>
INLINE void value_block(const float* weights, const Value* const* values, int64_t at, int64_t first, int64_t last,
                        float* sums, int64_t stride, TilesAhead<Cache>* ahead) {
    Vec total[Rows][Vecs];
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vecs; v++) total[r][v] = load(sums + r * stride + at + v * kWidth);
    for (int64_t j = first; j < last; j++) {
        if (at == 0 && ahead) ahead->go_on(kValuesShare);
        Vec value[Vecs];
        for (int v = 0; v < Vecs; v++) value[v] = load(values[j] + at + v * kWidth);
        for (int r = 0; r < Rows; r++) {
            const Vec weight = (Vec)broadcast_word(weights + r * kTile + j);
            for (int v = 0; v < Vecs; v++) total[r][v] = Word::add(weight, value[v], total[r][v]);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vecs; v++) store(sums + r * stride + at + v * kWidth, total[r][v]);
}

template <typename Word, int Rows, typename Value, typename Cache>
void value_rows(const float* weights, const Value* const* values, int64_t first, int64_t last, float* sums,
                int64_t stride, TilesAhead<Cache>* ahead) {
    int64_t d = 0;
    for (; d + kVecsAtOnce * kWidth <= stride; d += kVecsAtOnce * kWidth)
        value_block<Word, Rows, kVecsAtOnce>(weights, values, d, first, last, sums, stride, ahead);
    for (; d < stride; d += kWidth) value_block<Word, Rows, 1>(weights, values, d, first, last, sums, stride, ahead);
}

template <typename Word, int Rows, typename Value, typename Cache>
void value_rows_of(int64_t rows, const float* weights, const Value* const* values, int64_t first, int64_t last,
                   float* sums, int64_t stride, TilesAhead<Cache>* ahead) {
    if constexpr (Rows > 1)
        if (rows < Rows) return value_rows_of<Word, Rows - 1>(rows, weights, values, first, last, sums, stride, ahead);
    value_rows<Word, Rows>(weights, values, first, last, sums, stride, ahead);
}

template <typename Word, int Rows>
void score_rows_of(int64_t rows, const float* q, const KeyGroups& keys, int64_t words, int64_t first, int64_t last,
                   float* scores) {
    if constexpr (Rows > 1)
        if (rows < Rows) return score_rows_of<Word, Rows - 1>(rows, q, keys, words, first, last, scores);
    score_rows<Word, Rows>(q, keys, words, first, last, scores);
}

}  // namespace

