// Paged attention with AVX-512's dot products of pairs in bfloat16 (VDPBF16PS), of a cache that holds such pairs: both are read as
// they are multiplied. Included by paged_attention.h.
//
// What is multiplied is rounded to bfloat16 once, as in attention_tiles.h: queries, times scale · log2(e), and the softmax's
// weights, which are powers of two of the scores. Totals are those of the rounded weights. A score is one chain over pairs of
// elements, a sum one chain over pairs of a section's positions; positions that a row does not see have weights of zero,
// which change nothing. So a row's result depends on its own query and context only.
#pragma once

#include "attention_softmax.h"

namespace {

struct DotItem : SectionedItem<DotItem, Paired> {
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

    INLINE void finish_row(const float* sums, float total, float* out) {
        const float share = 1.0f / total;
        for (int64_t d = 0; d < a.dim; d += kWidth) store(out + d, load(sums + d) * share);
    }

    // Where each pair of values lies that some row sees. Behind the last position there may be anything: a copy is without it.
    INLINE void find_values(const TileRows<Paired>& here) {
        constexpr int64_t pairs = kPairedPositions / 2;  // of a group
        for (int64_t pair = here.first / 2; pair * 2 < here.last; pair++)
            scratch.value_rows[pair] = reinterpret_cast<const float*>(here.values[pair / pairs]) + pair % pairs * a.dim;
        if (here.last % 2 == 0) return;
        const float*& last = scratch.value_rows[here.last / 2];
        for (int64_t d = 0; d < a.dim; d += kWidth) store(scratch.values + d, (Vec)((BitVec)load(last + d) & 0xffff));
        last = scratch.values;
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

    void tile(int64_t base, TilesAhead<Paired>& tiles) {
        const TileRows<Paired>& here = tiles.take();
        const SeenRows seen = rows_that_see(base);
        if (seen.begin == seen.end) return;
        KeyGroups keys;
        for (int64_t i = 0; i < kVecs; i++) keys.at[i] = reinterpret_cast<const float*>(here.keys[i]);
        const auto* queries = reinterpret_cast<const float*>(scratch.queries);
        tiles.go_on((here.last - here.first) * kKeysShare);
        for (int64_t row = seen.begin; row < seen.end; row += kRowsAtOnce)
            score_rows_of<TwoNarrow, kRowsAtOnce>(min_of(kRowsAtOnce, seen.end - row), queries + row * a.dim / 2, keys,
                                                  a.dim / 2, seen.first, seen.last, scratch.scores + row * kTile);
        const int64_t share = (here.last - here.first) * kWeightsShare / (seen.end - seen.begin);
        for (int64_t row = seen.begin; row < seen.end; row++) {
            tiles.go_on(share);
            const int64_t first = first_seen(row, base), last = last_seen(row, base);
            if (first == 0 && last == kTile)
                weigh<true>(row, first, last);
            else
                weigh<false>(row, first, last);
        }
        find_values(here);
        for (int64_t row = seen.begin; row < seen.end; row += kRowsAtOnce) {
            const int64_t count = min_of(kRowsAtOnce, seen.end - row);
            const int64_t first = first_seen(row, base) / 2, last = (last_seen(row + count - 1, base) + 1) / 2;
            value_rows_of<TwoNarrow, kRowsAtOnce>(count, scratch.scores + row * kTile, scratch.value_rows, first, last,
                                                  scratch.sums + row * stride, stride, row == seen.begin ? &tiles : nullptr);
        }
    }
};

}  // namespace
