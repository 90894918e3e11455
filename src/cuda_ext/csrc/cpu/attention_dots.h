// Paged attention with AVX-512's dot products of pairs in bfloat16 (VDPBF16PS), of a bfloat16 cache whose heads are whole vectors
// of them. Included by paged_attention.h.
//
// What is multiplied is rounded to bfloat16 once, as in attention_tiles.h: queries, times scale · log2(e), and the softmax's
// weights, which are powers of two of the scores. Totals are those of the rounded weights. A score is one chain over pairs of
// elements, a sum one chain over pairs of a section's positions; positions that a row does not see have weights of zero,
// which change nothing. So a row's result depends on its own query and context only.
#pragma once

#include "attention_softmax.h"

namespace {

struct DotItem : SectionedItem<DotItem, bf16> {
    using SectionedItem::SectionedItem;
    static constexpr int kVecs = kTile / kWidth;
    static constexpr int64_t kNarrow = 2 * kWidth;  // bfloat16 of a vector

    static INLINE float power(float x) { return exp_one(x / kLog2E); }

    INLINE void start_row(int64_t row, const float* q) {
        const Vec scale = broadcast(a.soft_cap != 0 ? float(a.scale / a.soft_cap) : float(a.scale) * kLog2E);
        for (int64_t d = 0; d < a.dim; d += kNarrow)
            store_pairs(scratch.queries + row * a.dim + d, load(q + d) * scale, load(q + d + kWidth) * scale);
        store(scratch.lanes + row * kWidth, Vec{});
    }

    static INLINE void store_pairs(void* to, Vec low, Vec high) {
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }

    // The lanes' totals become the row's.
    INLINE void end_section() {
        for (int64_t row = 0; row < rows; row++) {
            scratch.total[row] = sum_of(load(scratch.lanes + row * kWidth));
            store(scratch.lanes + row * kWidth, Vec{});
        }
    }

    // Of each 32 elements the sums lie as _mm512_unpacklo_epi16 and _mm512_unpackhi_epi16 leave them.
    INLINE void finish_row(const float* sums, float total, float* out) {
        const float share = 1.0f / total;
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int64_t d = 0; d < a.dim; d += kNarrow) {
            const __m512 low = (__m512)(load(sums + d) * share), high = (__m512)(load(sums + d + kWidth) * share);
            store(out + d, (Vec)_mm512_permutex2var_ps(low, first, high));
            store(out + d + kWidth, (Vec)_mm512_permutex2var_ps(low, second, high));
        }
    }

    // Pairs of elements by positions.
    INLINE void turn_keys(const TileRows<bf16>& here, TilesAhead<bf16>& tiles) {
        for (int64_t j = here.first / kWidth * kWidth; j < here.last; j += kWidth) {
            tiles.go_on(kWidth * kKeysShare);
            for (int64_t d = 0; d < a.dim; d += kNarrow) {
                Vec v[kWidth];
                load_pairs(here.keys + j, d, v);
                for (int i = 0; i < kWidth; i++) store(scratch.columns + (d / 2 + i) * kTile + j, v[i]);
            }
        }
    }

    // Pairs of positions side by side.
    INLINE void pair_values(const TileRows<bf16>& here, TilesAhead<bf16>& tiles) {
        for (int64_t j = here.first / 2 * 2; j < here.last; j += 2) {
            tiles.go_on(2 * kValuesShare);
            float* row = scratch.values + j / 2 * stride;
            scratch.value_rows[j / 2] = row;
            for (int64_t d = 0; d < a.dim; d += kNarrow) {
                const __m512i even = _mm512_loadu_si512(here.values[j] + d), odd = _mm512_loadu_si512(here.values[j + 1] + d);
                _mm512_storeu_si512(row + d, _mm512_unpacklo_epi16(even, odd));
                _mm512_storeu_si512(row + d + kWidth, _mm512_unpackhi_epi16(even, odd));
            }
        }
    }

    __attribute__((noinline)) void raise_peak(int64_t row, float peak) {
        const Vec factor = broadcast(power(scratch.peak[row] - peak));
        scale_sums(row, factor);
        store(scratch.lanes + row * kWidth, load(scratch.lanes + row * kWidth) * factor);
        scratch.peak[row] = peak;
    }

    // A row's scores become weights, in half of their place; zero at positions that it does not see.
    template <bool IsAll>
    INLINE void weigh(int64_t row, int64_t first, int64_t last) {
        float* scores = scratch.scores + row * kTile;
        Vec s[kVecs];
        for (int i = 0; i < kVecs; i++) {
            s[i] = load(scores + i * kWidth);
            if (a.soft_cap != 0) s[i] = tanh_vec(s[i]) * (float(a.soft_cap) * kLog2E);
            if constexpr (!IsAll) {
                const IntVec index = IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + int32_t(i * kWidth);
                s[i] = select((IntVec)((index >= int32_t(first)) & (index < int32_t(last))), s[i], broadcast(-__builtin_inff()));
            }
        }
        const Vec highest = max_vec(max_vec(s[0], s[1]), max_vec(s[2], s[3]));
        if (_mm512_cmp_ps_mask((__m512)highest, (__m512)broadcast(scratch.peak[row] + kSlack), _CMP_GT_OQ))
            raise_peak(row, max_of_lanes(highest));
        const Vec peak = broadcast(scratch.peak[row]);
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        __m512 total = (__m512)load(scratch.lanes + row * kWidth);
        for (int i = 0; i < kVecs; i += 2) {
            const Vec low = weight_of(s[i] - peak, 0.0f), high = weight_of(s[i + 1] - peak, 0.0f);
            const __m512bh weights = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            total = _mm512_dpbf16_ps(total, ones, weights);
            _mm512_storeu_si512(scores + i * kWidth / 2, (__m512i)weights);
        }
        store(scratch.lanes + row * kWidth, (Vec)total);
    }

    void tile(int64_t base, TilesAhead<bf16>& tiles) {
        const TileRows<bf16>& here = tiles.take();
        const SeenRows seen = rows_that_see(base);
        if (seen.begin == seen.end) return;
        turn_keys(here, tiles);
        const auto* queries = reinterpret_cast<const float*>(scratch.queries);
        for (int64_t row = seen.begin; row < seen.end; row += kRowsAtOnce)
            score_rows_of<TwoNarrow, kRowsAtOnce>(min_of(kRowsAtOnce, seen.end - row), queries + row * a.dim / 2, scratch.columns,
                                                  a.dim / 2, seen.first, seen.last, scratch.scores + row * kTile);
        const int64_t share = (seen.last - seen.first) * kWeightsShare / (seen.end - seen.begin);
        for (int64_t row = seen.begin; row < seen.end; row++) {
            tiles.go_on(share);
            const int64_t first = first_seen(row, base), last = last_seen(row, base);
            if (first == 0 && last == kTile)
                weigh<true>(row, first, last);
            else
                weigh<false>(row, first, last);
        }
        pair_values(here, tiles);
        for (int64_t row = seen.begin; row < seen.end; row += kRowsAtOnce) {
            const int64_t count = min_of(kRowsAtOnce, seen.end - row);
            const int64_t first = first_seen(row, base) / 2, last = (last_seen(row + count - 1, base) + 1) / 2;
            value_rows_of<TwoNarrow, kRowsAtOnce>(count, scratch.scores + row * kTile, scratch.value_rows, first, last,
                                                  scratch.sums + row * stride, stride, static_cast<TilesAhead<bf16>*>(nullptr));
        }
    }
};

INLINE bool fits_dots(const AttentionArgs& a) { return a.cache_dtype == kBFloat16 && a.dim % DotItem::kNarrow == 0; }

}  // namespace
