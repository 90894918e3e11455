// Causal attention over the paged cache for any mixture of prompt chunks and single tokens.
//
// One work item is a few tokens of one sequence and one KV head: its rows are those tokens × the query heads
// that share the KV head. Keys are walked in tiles of kTile positions that begin at multiples of kTile, a
// score is one chain of additions over dim, a value sum one chain over the positions of a section, and a row skips
// the tiles it does not see. Sections begin at multiples of kSection and are put together in their order, whether
// one item did them all or each was an item of its own. So a row's result depends on its own query and its own context only: not on the other
// rows, not on how a prompt was cut into chunks, not on the number of threads.
#pragma once

#include "attention_walk.h"
#include "shoal_cpu.h"
#include "transpose.h"
#include "vec.h"

namespace {

constexpr int kRowsAtOnce = 6;
constexpr int kVecsAtOnce = kWidth == 16 ? 4 : 2;  // 6 × 4 of 32 registers, or 6 × 2 of 16

// --- keys: tile × dim → dim × tile ---

template <typename Cache>
INLINE void transpose_piece(const Cache* const* keys, int64_t dim, int64_t d, float* columns) {
    const int64_t n = min_of(kWidth, dim - d);
    Vec v[kWidth];
    for (int i = 0; i < kWidth; i++) v[i] = load_cached(keys[i], dim, d, n);
    transpose(v);
    for (int i = 0; i < n; i++) store(columns + (d + i) * kTile, v[i]);
}

// Two bfloat16 at a time: they travel through the transposition as one 32-bit element.
INLINE void load_pairs(const bf16* const* keys, int64_t d, Vec (&v)[kWidth]) {
    for (int i = 0; i < kWidth; i++) __builtin_memcpy(&v[i], keys[i] + d, sizeof v[i]);
    transpose(v);
}

INLINE void transpose_pairs(const bf16* const* keys, int64_t d, float* columns) {
    Vec v[kWidth];
    load_pairs(keys, d, v);
    for (int i = 0; i < kWidth; i++) {
        store(columns + (d + 2 * i) * kTile, (Vec)((BitVec)v[i] << 16));
        store(columns + (d + 2 * i + 1) * kTile, (Vec)((BitVec)v[i] & 0xffff0000));
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
        for (int64_t d = transpose_paired(keys + j, dim, columns + j); d < dim; d += kWidth)
            transpose_piece(keys + j, dim, d, columns + j);
    }
}

// --- scores[row][position] = q[row] · key[position] ---

template <int Rows, int Vecs>
INLINE void score_block(const float* q, const float* columns, int64_t dim, float* scores) {
    Vec sums[Rows][Vecs] = {};
    for (int64_t d = 0; d < dim; d++) {
        Vec key[Vecs];
        for (int v = 0; v < Vecs; v++) key[v] = load(columns + d * kTile + v * kWidth);
        for (int r = 0; r < Rows; r++) {
            const Vec element = broadcast(q[r * dim + d]);
            for (int v = 0; v < Vecs; v++) sums[r][v] = fma(element, key[v], sums[r][v]);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vecs; v++) store(scores + r * kTile + v * kWidth, sums[r][v]);
}

template <int Rows>
void score_rows(const float* q, const float* columns, int64_t dim, int64_t first, int64_t last, float* scores) {
    int64_t j = first / kWidth * kWidth;
    for (; j + kVecsAtOnce * kWidth <= round_up(last, kWidth); j += kVecsAtOnce * kWidth)
        score_block<Rows, kVecsAtOnce>(q, columns + j, dim, scores + j);
    for (; j < last; j += kWidth) score_block<Rows, 1>(q, columns + j, dim, scores + j);
}

// --- sums[row] += weights[row][position] · value[position], over positions [first, last) ---

template <int Rows, int Vecs, typename Value, typename Cache>
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
            const Vec weight = broadcast(weights[r * kTile + j]);
            for (int v = 0; v < Vecs; v++) total[r][v] = fma(weight, value[v], total[r][v]);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vecs; v++) store(sums + r * stride + at + v * kWidth, total[r][v]);
}

template <int Rows, typename Value, typename Cache>
void value_rows(const float* weights, const Value* const* values, int64_t first, int64_t last, float* sums,
                int64_t stride, TilesAhead<Cache>* ahead) {
    int64_t d = 0;
    for (; d + kVecsAtOnce * kWidth <= stride; d += kVecsAtOnce * kWidth)
        value_block<Rows, kVecsAtOnce>(weights, values, d, first, last, sums, stride, ahead);
    for (; d < stride; d += kWidth) value_block<Rows, 1>(weights, values, d, first, last, sums, stride, ahead);
}

template <int Rows, typename Value, typename Cache>
void value_rows_of(int64_t rows, const float* weights, const Value* const* values, int64_t first, int64_t last,
                   float* sums, int64_t stride, TilesAhead<Cache>* ahead) {
    if constexpr (Rows > 1)
        if (rows < Rows) return value_rows_of<Rows - 1>(rows, weights, values, first, last, sums, stride, ahead);
    value_rows<Rows>(weights, values, first, last, sums, stride, ahead);
}

template <int Rows>
void score_rows_of(int64_t rows, const float* q, const float* columns, int64_t dim, int64_t first, int64_t last,
                   float* scores) {
    if constexpr (Rows > 1)
        if (rows < Rows) return score_rows_of<Rows - 1>(rows, q, columns, dim, first, last, scores);
    score_rows<Rows>(q, columns, dim, first, last, scores);
}

}  // namespace

#if defined(__AMX_BF16__)
#include "attention_tiles.h"
#endif

namespace {

// --- one item ---

template <typename Cache>
struct AttentionItem : SpanView {
    AttentionScratch scratch;
    int64_t group = a.heads / a.kv_heads;
    int64_t rows = span.tokens * group;
    int64_t stride = round_up(a.dim, kWidth);  // of sums

    INLINE int64_t position_of(int64_t row) const { return scratch.positions[row]; }
    INLINE bool is_whole() const { return span.parts == nullptr; }

    void start() {
        for (int64_t row = 0; row < rows; row++) {
            const float* q = a.q + (span.first_token + row / group) * a.q_token_stride +
                             (span.kv_head * group + row % group) * a.q_head_stride;
            for_each_vec(a.dim, [&](int64_t i, int64_t n) { store_n(scratch.q + row * a.dim + i, load_n(q + i, n), n); });
            scratch.positions[row] = int32_t(first_position + row / group);
            scratch.whole_peak[row] = -__builtin_inff();
            scratch.whole_total[row] = 0.0f;
        }
        __builtin_memset(scratch.whole_sums, 0, rows * stride * sizeof(float));
    }

    void start_section() {
        for (int64_t row = 0; row < rows; row++) {
            scratch.peak[row] = -__builtin_inff();
            scratch.total[row] = 0.0f;
        }
        __builtin_memset(scratch.sums, 0, rows * stride * sizeof(float));
    }

    // Adds a section's sums to those of the sections before it.
    void add_section(const float* section_sums, const float* peaks, const float* totals) {
        for (int64_t row = 0; row < rows; row++) {
            const float before = scratch.whole_peak[row], here = peaks[row], peak = here > before ? here : before;
            if (here == -__builtin_inff()) continue;
            const Vec keep = broadcast(exp_one(before - peak)), take = broadcast(exp_one(here - peak));
            float* sums = scratch.whole_sums + row * stride;
            const float* more = section_sums + row * stride;
            for (int64_t d = 0; d < stride; d += kWidth)
                store(sums + d, fma(load(more + d), take, load(sums + d) * keep));
            scratch.whole_peak[row] = peak;
            scratch.whole_total[row] = totals[row] * take[0] + scratch.whole_total[row] * keep[0];
        }
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
            const Vec keep = broadcast(factors[r]);
            float* sums = scratch.sums + (row + r) * stride;
            for (int64_t d = 0; d < stride; d += kWidth) store(sums + d, load(sums + d) * keep);
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

    // What the row has summed up is relative to its peak. Without a branch, which would be guessed wrong: where the peak
    // stays, all is multiplied by 1.
    INLINE float raise_peak(int64_t row, float tile_peak) {
        const float before = scratch.peak[row], peak = tile_peak > before ? tile_peak : before;
        const Vec factor = exp_vec(broadcast(before == peak ? 0.0f : before - peak));
        float* sums = scratch.sums + row * stride;
        for (int64_t d = 0; d < stride; d += kWidth) store(sums + d, load(sums + d) * factor);
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
            const int64_t first = max_of(0, seen_from(position_of(row)) - base);
            const int64_t last = min_of(kTile, position_of(row + count - 1) + 1 - base);
            value_rows_of<kRowsAtOnce>(count, scratch.scores + row * kTile, value_rows, first, last,
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
        // Rows are in order of position, so those that see something of the tile are [begin, end).
        int64_t begin = 0, end = rows;
        while (begin < rows && position_of(begin) < base) begin++;
        while (end > begin && seen_from(position_of(end - 1)) >= base + kTile) end--;
        if (begin == end) return;
        const int64_t first = max_of(0, seen_from(position_of(begin)) - base);
        const int64_t last = min_of(kTile, position_of(end - 1) + 1 - base);
        const auto weigh_rows = [&] {
            const int64_t share = (last - first) * kWeightsShare / (end - begin);
            for (int64_t row = begin, count; row < end; row += count) {
                count = sees_all(row, base, end) ? kWidth : 1;
                tiles.go_on(share * count);
                if (count > 1)
                    weigh_rows_all(row);
                else
                    weigh(row, max_of(0, seen_from(position_of(row)) - base), min_of(kTile, position_of(row) + 1 - base));
            }
        };

        transpose_keys(here.keys, first, last, a.dim, scratch.columns, tiles);
        for (int64_t row = begin; row < end; row += kRowsAtOnce)
            score_rows_of<kRowsAtOnce>(min_of(kRowsAtOnce, end - row), scratch.q + row * a.dim, scratch.columns,
                                       a.dim, first, last, scratch.scores + row * kTile);
        weigh_rows();
        if constexpr (sizeof(Cache) > 1) {
            const bool read_often = sizeof(Cache) < sizeof(float) && end - begin > 2 * kRowsAtOnce;
            if (a.dim % kWidth == 0 && !read_often)
                return add_values(here.values, base, begin, end, tiles);
        }
        add_values(pad_values(here.values, first, last), base, begin, end, tiles);
    }

    void finish() {
        for (int64_t row = 0; row < rows; row++) {
            const int64_t token = span.first_token + row / group, head = span.kv_head * group + row % group;
            float* out = a.out + (token * a.heads + head) * a.dim;
            const float* sums = scratch.whole_sums + row * stride;
            const Vec total = broadcast(scratch.whole_total[row]);
            for_each_vec(a.dim, [&](int64_t i, int64_t n) { store_n(out + i, load(sums + i) / total, n); });
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
        start_section();
        for (; base <= end; base += kTile) {
            tile(base, tiles);
            if (base + kTile <= end && (base + kTile) % kSection) continue;
            if (is_whole())
                add_section(scratch.sums, scratch.peak, scratch.total);
            else
                keep_section(base / kSection);
            start_section();
        }
        if (is_whole()) finish();
    }

    void merge() {
        start();
        const int64_t first = seen_from(first_position) / kSection, last = position_of(rows - 1) / kSection;
        for (int64_t section = first; section <= last; section++) {
            const float* part = span.parts + section * rows * (stride + 2);
            add_section(part, part + rows * stride, part + rows * (stride + 1));
        }
        finish();
    }
};

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
#endif
    if (a.cache_dtype == kFloat32)
        attend<AttentionItem<float>, float>(a, spans, count, scratch, merges);
    else if (a.cache_dtype == kBFloat16)
        attend<AttentionItem<bf16>, bf16>(a, spans, count, scratch, merges);
    else
        attend<AttentionItem<int8_t>, int8_t>(a, spans, count, scratch, merges);
}

}  // namespace
