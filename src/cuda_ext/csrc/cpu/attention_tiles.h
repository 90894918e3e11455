// What paged_attention.h does on the tiles of AMX: the cache's bfloat16 as it is, queries and weights as two parts of
// bfloat16 (tile_product.h). Included by it where there are tiles.
#pragma once

#include "attention_plan.h"
#include "tile_product.h"

namespace {

constexpr int64_t kPositions = 16;  // that lie side by side

// Rows [begin, end) of an item against positions [first, last) of a tile of the cache; others are of no account.
struct TileSpan {
    int64_t dim, begin, end, first, last;
    int64_t top() const { return begin / kTileRows * kTileRows; }
};

// Scores of the rows, and of those that share their tiles.
template <typename Cache>
INLINE void score_on_tiles(const TileSpan& span, const Cache* const* keys, const AttentionScratch& scratch,
                           TilesAhead<Cache>& ahead) {
    const int64_t strips = span.dim / kStrip;
    const int64_t from = span.first / kPositions, to = (span.last + kPositions - 1) / kPositions;
    auto* turned = reinterpret_cast<Narrow*>(scratch.columns);  // [16 positions][strip][pair of elements][position]
    for (int64_t i = from; i < to; i++) {
        for (int64_t strip = 0; strip < strips; strip++) {
            ahead.go_on(kPositions * kKeysShare / strips);
            Vec v[kWidth];
            load_pairs(keys + i * kPositions, strip * kStrip, v);
            Narrow* words = turned + (i * strips + strip) * kStripWords;
            for (int64_t pair = 0; pair < kWidth; pair++) __builtin_memcpy(words + pair * kStrip, &v[pair], sizeof v[pair]);
        }
    }
    with_panels(to - from, [&](auto panels) {
        for (int64_t row = span.top(); row < span.end; row += kTileRows)
            multiply_tiles<panels()>({parts_of(scratch.query_parts, row, strips), turned + from * strips * kStripWords,
                                      strips * kStripWords, strips},
                                     {scratch.scores + row * kTile + from * kPositions, kPositions, kTile * 4}, true);
    });
}

// Adds the values by the rows' weights, and nothing to the rows up to ``bottom`` that share their tiles. Pairs of positions
// are interleaved within 128 bits, so of each 32 sums the first 16 are those of elements 0 to 3, 8 to 11 and so on.
template <typename Cache>
INLINE void add_values_on_tiles(const TileSpan& span, const Cache* const* values, const AttentionScratch& scratch,
                                int64_t bottom, int64_t stride, TilesAhead<Cache>& ahead) {
    constexpr int64_t strips = kTile / kStrip, pairs = kStrip / 2;
    const int64_t from = span.first / kStrip, to = (span.last + kStrip - 1) / kStrip;
    auto* paired = reinterpret_cast<Narrow*>(scratch.values);  // [16 elements][strip][pair of positions][element]
    for (int64_t pair = from * pairs; pair < to * pairs; pair++) {
        ahead.go_on(2 * kValuesShare);
        for (int64_t d = 0; d < span.dim; d += kStrip) {
            const __m512i x = _mm512_loadu_si512(values[2 * pair] + d), y = _mm512_loadu_si512(values[2 * pair + 1] + d);
            Narrow* words = paired + (d / kWidth * strips * pairs + pair) * kStrip;
            _mm512_storeu_si512(words, _mm512_unpacklo_epi16(x, y));
            _mm512_storeu_si512(words + strips * kStripWords, _mm512_unpackhi_epi16(x, y));
        }
    }
    for (int64_t row = span.top(); row < bottom; row++) {
        float* weights = scratch.scores + row * kTile;
        if (row < span.begin || row >= span.end) __builtin_memset(weights, 0, kTile * sizeof(float));
        split_row(weights, kTile, parts_of(scratch.weight_parts, row, strips));
    }
    for (int64_t d = 0; d < span.dim; d += kPanelsAtOnce * kWidth)
        with_panels((span.dim - d) / kWidth, [&](auto panels) {
            for (int64_t row = span.top(); row < span.end; row += kTileRows)
                multiply_tiles<panels()>({parts_of(scratch.weight_parts, row, strips) + from * 2 * kPartWords,
                                          paired + (d / kWidth * strips + from) * kStripWords, strips * kStripWords,
                                          to - from},
                                         {scratch.sums + row * stride + d, kWidth, stride * 4}, false);
        });
}

// 32 sums in the order of add_values_on_tiles → in the order of the elements.
INLINE void put_in_order(Vec first, Vec second, float* out) {
    const IntVec places = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    store(out, __builtin_shuffle(first, second, places));
    store(out + kWidth, __builtin_shuffle(first, second, places + 8));
}

}  // namespace
