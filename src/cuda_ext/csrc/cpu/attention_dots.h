// Paged attention with AVX-512's dot products of pairs in bfloat16 (VDPBF16PS), of heads that are whole vectors of them. A cache in
// pairs is read as it is multiplied; rows of bfloat16, and of 8-bit codes, become pairs tile by tile, with the same results for the
// same numbers. Included by paged_attention.h.
//
// What is multiplied is rounded to bfloat16 once, as in attention_tiles.h: queries, times scale · log2(e), the softmax's
// weights, which are powers of two of the scores, and what codes stand for. Totals are those of the rounded weights. A score
// is one chain over pairs of elements, a sum one chain over pairs of a section's positions; positions that a row does not
// see have weights of zero, which change nothing. So a row's result depends on its own query and context only.
#pragma once

#include <type_traits>

#include "attention_softmax.h"

namespace {

constexpr int64_t kNarrow = 2 * kWidth;  // bfloat16 of a vector

// Elements [d, d + kNarrow) of a row.
INLINE __m512i load_narrow(const bf16* row, int64_t, int64_t d) { return _mm512_loadu_si512(row + d); }
INLINE __m512i load_narrow(const int8_t* row, int64_t dim, int64_t d) {
    return narrow_both(load_cached(row, dim, d, kWidth), load_cached(row, dim, d + kWidth, kWidth));
}

template <typename Cache>
struct DotItem : SectionedItem<DotItem<Cache>, Cache> {
    using Base = SectionedItem<DotItem<Cache>, Cache>;
    using Base::Base;
    using Base::a, Base::rows, Base::scratch, Base::stride, Base::first_seen, Base::last_seen, Base::rows_that_see,
        Base::scale_sums;
    using typename Base::SeenRows;
    static constexpr int kVecs = kTile / kWidth;
    static constexpr bool kIsPaired = std::is_same_v<Cache, Paired>;

    static INLINE float power(float x) { return exp_one(x / kLog2E); }

    INLINE void start_row(int64_t row, const float* q) {
        const Vec scale = broadcast(a.soft_cap != 0 ? float(a.scale / a.soft_cap) : float(a.scale) * kLog2E);
        for (int64_t d = 0; d < a.dim; d += kNarrow)
            _mm512_storeu_si512(scratch.queries + row * a.dim + d,
                                narrow_both(load(q + d) * scale, load(q + d + kWidth) * scale));
        store(scratch.lanes + row * kWidth, Vec{});
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

    INLINE KeyGroups find_keys(const TileRows<Cache>& here, TilesAhead<Cache>& tiles) {
        if constexpr (kIsPaired)
            return point_at_keys(here, tiles);
        else
            return turn_keys(here, tiles);
    }

    INLINE KeyGroups point_at_keys(const TileRows<Paired>& here, TilesAhead<Paired>& tiles) {
        KeyGroups keys;
        for (int64_t i = 0; i < kVecs; i++) keys.at[i] = reinterpret_cast<const float*>(here.keys[i]);
        tiles.go_on((here.last - here.first) * kKeysShare);
        return keys;
    }

    // Pairs of elements by positions.
    INLINE KeyGroups turn_keys(const TileRows<Cache>& here, TilesAhead<Cache>& tiles) {
        KeyGroups keys;
        for (int64_t i = 0; i < kVecs; i++) keys.at[i] = scratch.columns + i * kWidth * (a.dim / 2);
        for (int64_t i = here.first / kWidth; i * kWidth < here.last; i++) {
            tiles.go_on(kWidth * kKeysShare);
            for (int64_t d = 0; d < a.dim; d += kNarrow) {
                Vec v[kWidth];
                for (int k = 0; k < kWidth; k++) v[k] = (Vec)load_narrow(here.keys[i * kWidth + k], a.dim, d);
                transpose(v);
                float* to = scratch.columns + (i * (a.dim / 2) + d / 2) * kWidth;
                for (int k = 0; k < kWidth; k++) store(to + k * kWidth, v[k]);
            }
        }
        return keys;
    }

    INLINE void find_values(const TileRows<Cache>& here, TilesAhead<Cache>& tiles) {
        if constexpr (kIsPaired)
            point_at_values(here);
        else
            pair_values(here, tiles);
    }

    // Elements of two positions side by side. Positions that are not seen have the numbers of one that is.
    INLINE void pair_values(const TileRows<Cache>& here, TilesAhead<Cache>& tiles) {
        alignas(64) static constexpr uint16_t kOrder[kNarrow] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                                 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(kOrder), high = _mm512_add_epi16(low, _mm512_set1_epi16(kWidth));
        for (int64_t j = here.first / 2 * 2; j < here.last; j += 2) {
            tiles.go_on(2 * kValuesShare);
            float* row = scratch.values + j / 2 * a.dim;
            scratch.value_rows[j / 2] = row;
            for (int64_t d = 0; d < a.dim; d += kNarrow) {
                const __m512i even = load_narrow(here.values[j], a.dim, d), odd = load_narrow(here.values[j + 1], a.dim, d);
                _mm512_storeu_si512(row + d, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_storeu_si512(row + d + kWidth, _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }

    // Where each pair of values lies that some row sees. Behind the last position there may be anything: a copy is without it.
    INLINE void point_at_values(const TileRows<Paired>& here) {
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
            const __m512i weights = narrow_both(low, high);
            total = _mm512_dpbf16_ps(total, ones, (__m512bh)weights);
            _mm512_storeu_si512(scores + i * kWidth / 2, weights);
        }
        store(scratch.lanes + row * kWidth, (Vec)total);
    }

    void tile(int64_t base, TilesAhead<Cache>& tiles) {
        const TileRows<Cache>& here = tiles.take();
        const SeenRows seen = rows_that_see(base);
        if (seen.begin == seen.end) return;
        const KeyGroups keys = find_keys(here, tiles);
        const auto* queries = reinterpret_cast<const float*>(scratch.queries);
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
        find_values(here, tiles);
        for (int64_t row = seen.begin; row < seen.end; row += kRowsAtOnce) {
            const int64_t count = min_of(kRowsAtOnce, seen.end - row);
            const int64_t first = first_seen(row, base) / 2, last = (last_seen(row + count - 1, base) + 1) / 2;
            value_rows_of<TwoNarrow, kRowsAtOnce>(count, scratch.scores + row * kTile, scratch.value_rows, first, last,
                                                  scratch.sums + row * stride, stride, kIsPaired && row == seen.begin ? &tiles : nullptr);
        }
    }
};

}  // namespace
