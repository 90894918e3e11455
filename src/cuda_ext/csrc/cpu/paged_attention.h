// Causal attention over the paged cache for any mixture of prompt chunks and single tokens.
//
// One work item is a few tokens of one sequence and one KV head: its rows are those tokens × the query heads
// that share the KV head. Keys are walked in tiles of kTile positions that begin at multiples of kTile, a
// score is one chain of additions over dim, a value sum one chain over the positions of a section, and a row skips
// the tiles it does not see. Sections begin at multiples of kSection and are put together in their order, whether
// one item did them all or each was an item of its own. So a row's result depends on its own query and its own context only: not on the other
// rows, not on how a prompt was cut into chunks, not on the number of threads.
#pragma once

#include "attention_products.h"
#include "attention_walk.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

// --- one item: how its sections are put together. Item: start_row, tile, end_section and finish_row ---

template <typename Item, typename Cache>
struct SectionedItem : SpanView {
    AttentionScratch scratch;
    int64_t group = a.heads / a.kv_heads;
    int64_t rows = span.tokens * group;
    int64_t stride = round_up(a.dim, kWidth);  // of sums

    SectionedItem(const SpanView& view, const AttentionScratch& memory) : SpanView(view), scratch(memory) {}

    INLINE int64_t position_of(int64_t row) const { return scratch.positions[row]; }
    INLINE bool is_whole() const { return span.parts == nullptr; }
    INLINE Item& item() { return static_cast<Item&>(*this); }

    void start() {
        for (int64_t row = 0; row < rows; row++) {
            item().start_row(row, a.q + (span.first_token + row / group) * a.q_token_stride +
                                      (span.kv_head * group + row % group) * a.q_head_stride);
            scratch.positions[row] = int32_t(first_position + row / group);
        }
    }

    void start_whole() {
        for (int64_t row = 0; row < rows; row++) {
            scratch.whole_peak[row] = -__builtin_inff();
            scratch.whole_total[row] = 0.0f;
        }
        __builtin_memset(scratch.whole_sums, 0, rows * stride * sizeof(float));
    }

    // Of a tile's positions, those that a row sees.
    INLINE int64_t first_seen(int64_t row, int64_t base) const { return max_of(0, seen_from(position_of(row)) - base); }
    INLINE int64_t last_seen(int64_t row, int64_t base) const { return min_of(kTile, position_of(row) + 1 - base); }

    // The rows that see something of a tile, which are in order of position, and what they see of it.
    struct SeenRows {
        int64_t begin, end, first, last;
    };

    INLINE SeenRows rows_that_see(int64_t base) const {
        int64_t begin = 0, end = rows;
        while (begin < rows && position_of(begin) < base) begin++;
        while (end > begin && seen_from(position_of(end - 1)) >= base + kTile) end--;
        if (begin == end) return {begin, end, 0, 0};
        return {begin, end, first_seen(begin, base), last_seen(end - 1, base)};
    }

    void start_section() {
        for (int64_t row = 0; row < rows; row++) {
            scratch.peak[row] = -__builtin_inff();
            scratch.total[row] = 0.0f;
        }
        __builtin_memset(scratch.sums, 0, rows * stride * sizeof(float));
    }

    // What the row has summed up of a section, times a factor: it is relative to a peak.
    INLINE void scale_sums(int64_t row, Vec factor) {
        float* sums = scratch.sums + row * stride;
        for (int64_t d = 0; d < stride; d += kWidth) store(sums + d, load(sums + d) * factor);
    }

    // Adds a section's sums to those of the sections before it.
    void add_section(const float* section_sums, const float* peaks, const float* totals) {
        for (int64_t row = 0; row < rows; row++) {
            const float before = scratch.whole_peak[row], here = peaks[row], peak = here > before ? here : before;
            if (here == -__builtin_inff()) continue;
            const Vec keep = broadcast(Item::power(before - peak)), take = broadcast(Item::power(here - peak));
            float* sums = scratch.whole_sums + row * stride;
            const float* more = section_sums + row * stride;
            for (int64_t d = 0; d < stride; d += kWidth)
                store(sums + d, fma(load(more + d), take, load(sums + d) * keep));
            scratch.whole_peak[row] = peak;
            scratch.whole_total[row] = totals[row] * take[0] + scratch.whole_total[row] * keep[0];
        }
    }

    void finish(const float* all_sums, const float* totals) {
        for (int64_t row = 0; row < rows; row++) {
            const int64_t token = span.first_token + row / group, head = span.kv_head * group + row % group;
            float* out = a.out + (token * a.heads + head) * a.dim;
            item().finish_row(all_sums + row * stride, totals[row], out);
        }
    }

    // Puts a section's sums where they are merged later.
    void keep_section(int64_t section) {
        float* part = span.parts + section * rows * (stride + 2);
        __builtin_memcpy(part, scratch.sums, rows * stride * sizeof(float));
        __builtin_memcpy(part + rows * stride, scratch.peak, rows * sizeof(float));
        __builtin_memcpy(part + rows * (stride + 1), scratch.total, rows * sizeof(float));
    }

    void run(TilesAhead<Cache>& tiles) {
        start();
        const int64_t end = last_base();
        int64_t base = first_base();
        if (base > end) return;
        // What is added to nothing stays as it is.
        const bool is_one = is_whole() && base / kSection == end / kSection;
        if (!is_one) start_whole();
        start_section();
        for (; base <= end; base += kTile) {
            item().tile(base, tiles);
            if (base + kTile <= end && (base + kTile) % kSection) continue;
            item().end_section();
            if (is_one) return finish(scratch.sums, scratch.total);
            if (is_whole())
                add_section(scratch.sums, scratch.peak, scratch.total);
            else
                keep_section(base / kSection);
            start_section();
        }
        if (is_whole()) finish(scratch.whole_sums, scratch.whole_total);
    }

    void merge() {
        start();
        start_whole();
        const int64_t first = seen_from(first_position) / kSection, last = position_of(rows - 1) / kSection;
        for (int64_t section = first; section <= last; section++) {
            const float* part = span.parts + section * rows * (stride + 2);
            add_section(part, part + rows * stride, part + rows * (stride + 1));
        }
        finish(scratch.whole_sums, scratch.whole_total);
    }
};

// On floats, of any cache.
template <typename Cache>
struct AttentionItem : SectionedItem<AttentionItem<Cache>, Cache> {
    using Base = SectionedItem<AttentionItem<Cache>, Cache>;
    using Base::Base;
    using Base::a, Base::rows, Base::scratch, Base::stride, Base::position_of, Base::seen_from, Base::first_seen,
        Base::last_seen, Base::rows_that_see, Base::scale_sums;

    static INLINE float power(float x) { return exp_one(x); }

    INLINE void start_row(int64_t row, const float* q) {
        for_each_vec(a.dim, [&](int64_t i, int64_t n) { store_n(scratch.q + row * a.dim + i, load_n(q + i, n), n); });
    }

    INLINE void end_section() {}

    INLINE void finish_row(const float* sums, float total, float* out) {
        for_each_vec(a.dim, [&](int64_t i, int64_t n) { store_n(out + i, load(sums + i) / total, n); });
    }

    // A vector of scores as the softmax takes them.
    INLINE Vec score_at(const float* scores, int64_t j) const {
        Vec s = load(scores + j) * float(a.scale);
        if (a.soft_cap != 0) s = tanh_vec(s / float(a.soft_cap)) * float(a.soft_cap);
        return s;
    }

    // Turns a row's scores at the tile's positions [first, last) into weights; zero elsewhere.
    INLINE void weigh(int64_t row, int64_t first, int64_t last) {
        if (first == 0 && last == kTile)
            weigh_all(row);
        else
            weigh_some(row, first, last);
    }

    // weigh_all of kWidth rows, with the same results: what each does once, one vector does for all.
    void weigh_rows_all(int64_t row) {
        float* scores = scratch.scores + row * kTile;
        constexpr int kVecs = kTile / kWidth;
        Vec folded[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; r++) {
            Vec peaks = broadcast(-__builtin_inff());
            for (int i = 0; i < kVecs; i++) {
                const Vec s = score_at(scores + r * kTile, i * kWidth);
                store(scores + r * kTile + i * kWidth, s);
                peaks = max_vec(peaks, s);
            }
            folded[fold_place(r)] = peaks;
        }
        const Vec tile_peak = fold_rows(folded, [](Vec a, Vec b) { return a > b ? a : b; });
        const Vec before = load(scratch.peak + row), peak = tile_peak > before ? tile_peak : before;
        const Vec factor = exp_vec(before == peak ? Vec{} : before - peak);
        float factors[kWidth];
        store(factors, factor);
        for (int r = 0; r < kWidth; r++) {
            if (factors[r] == 1.0f) continue;
            scale_sums(row + r, broadcast(factors[r]));
        }
        store(scratch.peak + row, peak);
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; r++) {
            const Vec own = broadcast(scratch.peak[row + r]);
            Vec total = {};
            for (int i = 0; i < kVecs; i++) {
                const Vec weight = exp_vec(load(scores + r * kTile + i * kWidth) - own);
                store(scores + r * kTile + i * kWidth, weight);
                total += weight;
            }
            folded[fold_place(r)] = total;
        }
        const Vec totals = fold_rows(folded, [](Vec a, Vec b) { return a + b; });
        store(scratch.total + row, load(scratch.total + row) * factor + totals);
    }

    void weigh_all(int64_t row) {
        float* scores = scratch.scores + row * kTile;
        constexpr int kVecs = kTile / kWidth;
        Vec s[kVecs], peaks = broadcast(-__builtin_inff()), total = {};
#pragma GCC unroll 16
        for (int i = 0; i < kVecs; i++) {
            s[i] = score_at(scores, i * kWidth);
            peaks = max_vec(peaks, s[i]);
        }
        const float peak = raise_peak(row, max_of_lanes(peaks));
#pragma GCC unroll 16
        for (int i = 0; i < kVecs; i++) {
            const Vec weight = exp_vec(s[i] - peak);
            store(scores + i * kWidth, weight);
            total += weight;
        }
        scratch.total[row] += sum_of(total);
    }

    void weigh_some(int64_t row, int64_t first, int64_t last) {
        float* scores = scratch.scores + row * kTile;
        const Vec nothing = broadcast(-__builtin_inff());
        IntVec lane;
        for (int i = 0; i < kWidth; i++) lane[i] = i;
        const int64_t from = first / kWidth * kWidth, to = round_up(last, kWidth);
        Vec peaks = nothing;
        for (int64_t j = from; j < to; j += kWidth) {
            const IntVec index = lane + int32_t(j);
            const Vec s = select((IntVec)((index >= int32_t(first)) & (index < int32_t(last))), score_at(scores, j),
                                 nothing);
            store(scores + j, s);
            peaks = max_vec(peaks, s);
        }
        const float peak = raise_peak(row, max_of_lanes(peaks));
        Vec total = {};
        for (int64_t j = from; j < to; j += kWidth) {
            const Vec weight = exp_vec(load(scores + j) - peak);
            store(scores + j, weight);
            total += weight;
        }
        for (int64_t j = 0; j < from; j += kWidth) store(scores + j, Vec{});
        for (int64_t j = to; j < kTile; j += kWidth) store(scores + j, Vec{});
        scratch.total[row] += sum_of(total);
    }

    // Without a branch, which would be guessed wrong: where the peak
    // stays, all is multiplied by 1.
    INLINE float raise_peak(int64_t row, float tile_peak) {
        const float before = scratch.peak[row], peak = tile_peak > before ? tile_peak : before;
        const Vec factor = exp_vec(broadcast(before == peak ? 0.0f : before - peak));
        scale_sums(row, factor);
        scratch.total[row] *= factor[0];
        scratch.peak[row] = peak;
        return peak;
    }

    // Values as padded rows of floats, where they have scales, where a vector load would run over a row's end, or where
    // widening them once is less work.
    const float* const* pad_values(const Cache* const* values, int64_t first, int64_t last) {
        for (int64_t j = first; j < last; j++) {
            float* row = scratch.values + j * stride;
            for_each_vec(a.dim, [&](int64_t i, int64_t n) { store(row + i, load_cached(values[j], a.dim, i, n)); });
            scratch.value_rows[j] = row;
        }
        return scratch.value_rows;
    }

    template <typename Value>
    void add_values(const Value* const* value_rows, int64_t base, int64_t begin, int64_t end,
                    TilesAhead<Cache>& ahead) {
        for (int64_t row = begin; row < end; row += kRowsAtOnce) {
            const int64_t count = min_of(kRowsAtOnce, end - row);
            const int64_t first = first_seen(row, base), last = last_seen(row + count - 1, base);
            value_rows_of<OneFloat, kRowsAtOnce>(count, scratch.scores + row * kTile, value_rows, first, last,
                                       scratch.sums + row * stride, stride,
                                       row == begin ? &ahead : nullptr);
        }
    }

    // Whether kWidth rows up to ``end`` see every position of a tile; rows are in order of position.
    INLINE bool sees_all(int64_t row, int64_t base, int64_t end) const {
        return row + kWidth <= end && position_of(row) + 1 - base >= kTile &&
               seen_from(position_of(row + kWidth - 1)) <= base;
    }

    void tile(int64_t base, TilesAhead<Cache>& tiles) {
        const TileRows<Cache>& here = tiles.take();
        const auto [begin, end, first, last] = rows_that_see(base);
        if (begin == end) return;
        const auto weigh_rows = [&] {
            const int64_t share = (last - first) * kWeightsShare / (end - begin);
            for (int64_t row = begin, count; row < end; row += count) {
                count = sees_all(row, base, end) ? kWidth : 1;
                tiles.go_on(share * count);
                if (count > 1)
                    weigh_rows_all(row);
                else
                    weigh(row, first_seen(row, base), last_seen(row, base));
            }
        };

        transpose_keys(here.keys, first, last, a.dim, scratch.columns, tiles);
        KeyGroups keys;
        for (int64_t i = 0; i < kTile / kWidth; i++) keys.at[i] = scratch.columns + i * kWidth * a.dim;
        for (int64_t row = begin; row < end; row += kRowsAtOnce)
            score_rows_of<OneFloat, kRowsAtOnce>(min_of(kRowsAtOnce, end - row), scratch.q + row * a.dim, keys,
                                       a.dim, first, last, scratch.scores + row * kTile);
        weigh_rows();
        if constexpr (sizeof(Cache) > 1) {
            const bool read_often = sizeof(Cache) < sizeof(float) && end - begin > 2 * kRowsAtOnce;
            if (a.dim % kWidth == 0 && !read_often)
                return add_values(here.values, base, begin, end, tiles);
        }
        add_values(pad_values(here.values, first, last), base, begin, end, tiles);
    }
};

}  // namespace

#if defined(__AMX_BF16__)
#include "attention_tiles.h"
#endif
#if defined(__AVX512BF16__)
#include "attention_dots.h"
#endif

namespace {

template <typename Item, typename Cache>
void attend(const AttentionArgs& a, const AttentionSpan* spans, int64_t count, const AttentionScratch& scratch,
            bool merges) {
    if (merges) {
        for (int64_t i = 0; i < count; i++) Item{{a, spans[i]}, scratch}.merge();
        return;
    }
    TilesAhead<Cache> tiles(a, spans, count);
    for (int64_t i = 0; i < count; i++) Item{{a, spans[i]}, scratch}.run(tiles);
}

void paged_attention(const AttentionArgs& a, const AttentionSpan* spans, int64_t count,
                     const AttentionScratch& scratch, bool merges) {
#if defined(__AMX_BF16__)
    if (fits_tiles(a)) return attend<TileItem, bf16>(a, spans, count, scratch, merges);
#elif defined(__AVX512BF16__)
    if (a.cache_dtype == kBFloat16Pairs) return attend<DotItem<Paired>, Paired>(a, spans, count, scratch, merges);
    if (a.cache_dtype == kBFloat16 && a.dim % kNarrow == 0)
        return attend<DotItem<bf16>, bf16>(a, spans, count, scratch, merges);
#endif
#if defined(__AVX512BF16__)
    if (a.cache_dtype == kInt8 && a.dim % kNarrow == 0)
        return attend<DotItem<int8_t>, int8_t>(a, spans, count, scratch, merges);
#endif
    if (a.cache_dtype == kFloat32)
        attend<AttentionItem<float>, float>(a, spans, count, scratch, merges);
    else if (a.cache_dtype == kBFloat16)
        attend<AttentionItem<bf16>, bf16>(a, spans, count, scratch, merges);
    else
        attend<AttentionItem<int8_t>, int8_t>(a, spans, count, scratch, merges);
}

}  // namespace
