// Paged attention on the tiles of AMX, of a bfloat16 cache whose heads are whole strips. Included by paged_attention.h.
//
// What is multiplied is rounded to bfloat16 once: queries, times scale · log2(e), and the softmax's weights, which are powers
// of two of the scores. Totals are those of the rounded weights. All products are the other way round, positions or elements
// by rows: so keys go on tiles as they lie in the cache, a vector has one position's scores of 16 rows, and what a row does
// by itself is a lane. A row's peak rises only where a tile of positions exceeds it by more than kSlack, so that sums are
// seldom multiplied. A score is one chain over dim, a sum one chain over the positions of a section; positions that a row
// does not see have weights of zero, which change nothing. So a row's result depends on its own query and context only.
#pragma once

#include "attention_softmax.h"
#include "attention_walk.h"
#include "tile_product.h"
#include "transpose.h"

namespace {

constexpr float kHalf = 0x1p-8f;                 // of a bfloat16's last place: cutting off rounds then
constexpr int64_t kGroups = kTile / kTileRows;   // of positions
constexpr int64_t kStrips = kTile / kStrip;      // of positions
constexpr int64_t kTurnShare = 3, kBlocksShare = kShares - kTurnShare;

// Tiles: sums 0 to 3, columns 4, rows 6; a row of ones 5, and of totals 7.
INLINE void load_attention_shapes() {
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) shapes.set(tile, tile == 5 || tile == 7 ? 1 : kTileRows, kTileLine);
    _tile_loadconfig(&shapes);
    alignas(64) Narrow ones[kStrip];
    for (Narrow& one : ones) one = 0x3f80;
    asm volatile("" ::: "memory");
    _tile_loadd(5, ones, kTileLine);
}

// 16 rows of some panels, by ``strips`` strips of 16 columns: pairs of inputs, side by side.
struct RowsByColumns {
    const Narrow* rows[kPanelsAtOnce];
    int64_t row_bytes, step;  // from row to row, and words from strip to strip
    const Narrow* columns;
    int64_t strips;
};

constexpr int64_t kTileFloats = kTileRows * kWidth;

#define LOAD_SUMS(SUMS, OTHER) _tile_loadd(SUMS, sums + SUMS * kTileFloats, kTileLine);
#define STORE_SUMS(SUMS, OTHER) _tile_stored(SUMS, sums + SUMS * kTileFloats, kTileLine);
#define MULTIPLY_ROWS(SUMS, OTHER)                                 \
    _tile_loadd(6, of.rows[SUMS] + strip * of.step, of.row_bytes); \
    _tile_dpbf16ps(SUMS, 6, 4);

// sums: [panels, 16 rows, 16 columns]. totals: null, or the columns' own sums, to which theirs are added.
template <int Panels>
INLINE void multiply_columns(const RowsByColumns& of, float* sums, bool starts, float* totals = nullptr) {
    asm volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
    if (starts) {
        EACH_PANEL(ZERO)
    } else {
        EACH_PANEL(LOAD_SUMS)
    }
    if (totals) _tile_loadd(7, totals, kTileLine);
    for (int64_t strip = 0; strip < of.strips; strip++) {
        _tile_loadd(4, of.columns + strip * kStripWords, kTileLine);
        EACH_PANEL(MULTIPLY_ROWS)
        if (totals) _tile_dpbf16ps(7, 5, 4);
    }
    EACH_PANEL(STORE_SUMS)
    if (totals) _tile_stored(7, totals, kTileLine);
    asm volatile("" ::: "memory");
}

// The upper halves of both, side by side.
INLINE BitVec pair_up(Vec first, Vec second) { return (BitVec)first >> 16 | ((BitVec)second & 0xffff0000); }

// 32 positions × 8 elements, from element d on → 8 rows of 32 positions.
INLINE void turn_values(const bf16* const* values, int64_t d, Narrow* to) {
    __m512i v[8], w[8];
    for (int i = 0; i < 8; i++) {
        const auto part = [&](int from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values[from + i] + d)); };
        v[i] = _mm512_castsi128_si512(part(0));
        v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x00f0, part(8));
        v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x0f00, part(16));
        v[i] = _mm512_mask_broadcast_i32x4(v[i], 0xf000, part(24));
    }
    for (int i = 0; i < 4; i++) {
        w[i] = _mm512_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
        w[i + 4] = _mm512_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_unpacklo_epi32(w[2 * i], w[2 * i + 1]);
        v[i + 4] = _mm512_unpackhi_epi32(w[2 * i], w[2 * i + 1]);
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 2; i++) {
            const __m512i x = v[4 * i + 2 * half], y = v[4 * i + 2 * half + 1];
            Narrow* rows = to + (4 * half + 2 * i) * kStrip;
            _mm512_storeu_si512(rows, _mm512_unpacklo_epi64(x, y));
            _mm512_storeu_si512(rows + kStrip, _mm512_unpackhi_epi64(x, y));
        }
}

// The positions of a tile that some of a block's 16 rows see.
struct SeenByBlock {
    int64_t first, last;
    bool is_all;  // by every row
    bool starts;  // the block's first tile of its section
    int64_t first_strip() const { return first / kStrip; }
    int64_t last_strip() const { return (last + kStrip - 1) / kStrip; }
};

// [blocks of 16 rows, dim, 16], and [blocks, 16] twice.
struct BlockSums {
    float *sums, *peak, *total;
};

struct TileItem : SpanView {
    AttentionScratch scratch;
    int64_t group = a.heads / a.kv_heads;
    int64_t rows = span.tokens * group;
    int64_t blocks = (rows + kTileRows - 1) / kTileRows;
    int64_t strips = a.dim / kStrip;
    BlockSums section{scratch.sums, scratch.peak, scratch.total};
    BlockSums whole{scratch.whole_sums, scratch.whole_peak, scratch.whole_total};

    INLINE int64_t lowest(int64_t block) const { return scratch.positions[block * kTileRows]; }
    INLINE int64_t highest(int64_t block) const { return scratch.positions[(block + 1) * kTileRows - 1]; }

    // Whether a row of the block sees one of the positions [begin, end).
    INLINE bool sees(int64_t block, int64_t begin, int64_t end) const {
        return highest(block) >= begin && seen_from(lowest(block)) < end;
    }

    INLINE SeenByBlock seen_by(int64_t block, int64_t base) const {
        const int64_t low = lowest(block), high = highest(block);
        const int64_t start = max_of(base / kSection * kSection, seen_from(low) / kTile * kTile);
        return {max_of(0, seen_from(low) - base), min_of(kTile, high + 1 - base),
                low + 1 - base >= kTile && seen_from(high) <= base, base == start};
    }

    // Calls use(lane, the span's token, the KV head's query head) for each row of a block. Rows beyond the last repeat it.
    template <typename Use>
    INLINE void each_row(int64_t block, Use use) const {
        int64_t row = block * kTileRows, token = row / group, head = row % group;
        for (int64_t lane = 0; lane < kTileRows; lane++) {
            use(lane, token, head);
            if (++row >= rows) continue;
            token += head + 1 == group;
            head = head + 1 == group ? 0 : head + 1;
        }
    }

    void find_positions() {
        for (int64_t block = 0; block < blocks; block++)
            each_row(block, [&](int64_t lane, int64_t token, int64_t) {
                scratch.positions[block * kTileRows + lane] = int32_t(first_position + token);
            });
    }

    void take_queries() {
        const float scale = a.soft_cap != 0 ? float(a.scale / a.soft_cap) : float(a.scale) * kLog2E;
        for (int64_t block = 0; block < blocks; block++) {
            const float* q[kTileRows];
            each_row(block, [&](int64_t lane, int64_t token, int64_t head) {
                q[lane] = a.q + (span.first_token + token) * a.q_token_stride +
                          (span.kv_head * group + head) * a.q_head_stride;
            });
            for (int64_t strip = 0; strip < strips; strip++) {
                Vec v[kWidth];
                for (int64_t lane = 0; lane < kTileRows; lane++) {
                    const Vec low = load(q[lane] + strip * kStrip), high = load(q[lane] + strip * kStrip + kWidth);
                    v[lane] = (Vec)narrow_both(low * scale, high * scale);
                }
                transpose(v);
                __builtin_memcpy(scratch.queries + (block * strips + strip) * kStripWords, v, sizeof v);
            }
        }
    }

    void start_section() {
        for (int64_t i = 0; i < blocks * kTileRows; i += kWidth) {
            store(section.peak + i, broadcast(-__builtin_inff()));
            store(section.total + i, Vec{});
        }
    }

    // Where each 16 keys begin that lie one after the other; copies them where a block of the cache may end between.
    INLINE void find_keys(const TileRows<bf16>& tile, const bf16* (&keys)[kGroups]) {
        for (int64_t group = tile.first / kTileRows; group * kTileRows < tile.last; group++) {
            const int64_t at = max_of(group * kTileRows, tile.first);
            if (a.block_size % kTileRows == 0) {
                keys[group] = tile.keys[at] - at % kTileRows * a.dim;
                continue;
            }
            auto* copy = reinterpret_cast<Narrow*>(scratch.columns) + group * kTileRows * a.dim;
            for (int64_t i = 0; i < kTileRows; i++)
                __builtin_memcpy(copy + i * a.dim, tile.keys[group * kTileRows + i], size_t(a.dim) * sizeof(bf16));
            keys[group] = copy;
        }
    }

    // scores: [positions, 16 rows].
    INLINE void score(int64_t block, const SeenByBlock& seen, const bf16* const (&keys)[kGroups], float* scores) const {
        const int64_t from = seen.first / kTileRows, to = (seen.last + kTileRows - 1) / kTileRows;
        RowsByColumns of{{}, a.dim * int64_t(sizeof(bf16)), kStrip, scratch.queries + block * strips * kStripWords, strips};
        for (int64_t group = from; group < to; group++) of.rows[group - from] = keys[group];
        with_panels(to - from, [&](auto panels) { multiply_columns<panels()>(of, scores + from * kTileFloats, true); });
    }

    void cap(const SeenByBlock& seen, float* scores) const {
        for (int64_t j = seen.first; j < seen.last; j++) {
            float* at = scores + j * kWidth;
            store(at, tanh_vec(load(at)) * (float(a.soft_cap) * kLog2E));
        }
    }

    // What a row does not see has no weight.
    void hide(int64_t block, int64_t base, const SeenByBlock& seen, float* scores) const {
        IntVec last;
        __builtin_memcpy(&last, scratch.positions + block * kTileRows, sizeof last);
        last -= int32_t(base);
        const IntVec first = a.window > 0 ? last - int32_t(a.window - 1) : broadcast_int(-1);
        for (int64_t j = seen.first_strip() * kStrip; j < seen.last_strip() * kStrip; j++) {
            float* at = scores + j * kWidth;
            const IntVec is_seen = (IntVec)((first <= int32_t(j)) & (last >= int32_t(j)));
            store(at, select(is_seen, load(at), broadcast(-__builtin_inff())));
        }
    }

    static INLINE IntVec broadcast_int(int32_t x) { return x - IntVec{}; }

    // Scores become weights: [strips, pairs of positions, 16 rows].
    INLINE void weigh(int64_t block, const SeenByBlock& seen, const float* scores) {
        const int64_t from = seen.first_strip() * kStrip, to = seen.last_strip() * kStrip;
        Vec peaks[4];
        for (Vec& peak : peaks) peak = broadcast(-__builtin_inff());
        for (int64_t j = from; j < to; j += 4)
            for (int64_t i = 0; i < 4; i++) peaks[i] = max_vec(peaks[i], load(scores + (j + i) * kWidth));
        const Vec highest = max_vec(max_vec(peaks[0], peaks[1]), max_vec(peaks[2], peaks[3]));
        Vec peak = load(section.peak + block * kTileRows);
        const IntVec rises = (IntVec)(highest > peak + kSlack);
        if (_mm512_test_epi32_mask((__m512i)rises, (__m512i)rises)) {
            const Vec before = peak;
            peak = select(rises, highest, before);
            store(section.peak + block * kTileRows, peak);
            if (!seen.starts) lower(section, block, select(rises, exp_vec((before - peak) / kLog2E), broadcast(1.0f)));
        }
        peak = select((IntVec)(peak == broadcast(-__builtin_inff())), Vec{}, peak);
        for (int64_t j = from; j < to; j += 2) {
            const Vec first = weight_of(load(scores + j * kWidth) - peak, kHalf);
            const Vec second = weight_of(load(scores + (j + 1) * kWidth) - peak, kHalf);
            const BitVec pair = pair_up(first, second);
            __builtin_memcpy(scratch.weights + j * kWidth, &pair, sizeof pair);
        }
    }

    // Sums relative to a higher peak.
    __attribute__((noinline)) void lower(const BlockSums& of, int64_t block, Vec factor) {
        float* sums = of.sums + block * a.dim * kWidth;
        for (int64_t d = 0; d < a.dim; d++) store(sums + d * kWidth, load(sums + d * kWidth) * factor);
        store(of.total + block * kTileRows, load(of.total + block * kTileRows) * factor);
    }

    INLINE void add_values(int64_t block, const SeenByBlock& seen, const Narrow* turned) {
        const int64_t strip = seen.first_strip(), panel_words = kStrips * kStripWords;
        RowsByColumns of{{}, kTileLine, kStripWords, scratch.weights + strip * kStripWords, seen.last_strip() - strip};
        float* sums = section.sums + block * a.dim * kWidth;
        const int64_t all = a.dim / kTileRows;
        for (int64_t panel = 0; panel < all; panel += kPanelsAtOnce)
            with_panels(all - panel, [&](auto panels) {
                for (int64_t i = 0; i < panels(); i++) of.rows[i] = turned + (panel + i) * panel_words + strip * kStripWords;
                multiply_columns<panels()>(of, sums + panel * kTileFloats, seen.starts,
                                           panel == 0 ? section.total + block * kTileRows : nullptr);
            });
    }

    void tile(int64_t base, TilesAhead<bf16>& tiles) {
        const TileRows<bf16>& here = tiles.take();
        int64_t begin = 0, end = blocks;
        while (begin < end && !sees(begin, base, base + kTile)) begin++;
        while (end > begin && !sees(end - 1, base, base + kTile)) end--;
        if (begin == end) return;
        const int64_t positions = here.last - here.first;
        auto* turned = reinterpret_cast<Narrow*>(scratch.values);  // [panels of 16 elements, strips, 16, 32 positions]
        for (int64_t strip = here.first / kStrip; strip * kStrip < here.last; strip++)
            for (int64_t d = 0; d < a.dim; d += 8) {
                tiles.go_on(kStrip * kTurnShare * 8 / a.dim);
                turn_values(here.values + strip * kStrip, d,
                            turned + (d / kTileRows * kStrips + strip) * kStripWords + d % kTileRows * kStrip);
            }
        const bf16* keys[kGroups];
        find_keys(here, keys);
        SeenByBlock seen = seen_by(begin, base);
        const auto scores_of = [&](int64_t block) { return scratch.scores + block % 2 * kTile * kWidth; };
        score(begin, seen, keys, scores_of(begin));
        for (int64_t block = begin; block < end; block++) {
            SeenByBlock next{};
            if (block + 1 < end) {
                next = seen_by(block + 1, base);
                score(block + 1, next, keys, scores_of(block + 1));  // on their way during this one's weights
            }
            tiles.go_on(positions * kBlocksShare / (end - begin));
            float* scores = scores_of(block);
            if (a.soft_cap != 0) cap(seen, scores);
            if (!seen.is_all) hide(block, base, seen, scores);
            weigh(block, seen, scores);
            add_values(block, seen, turned);
            seen = next;
        }
    }

    // Adds a section's sums to those of the sections before it.
    void add_section(const BlockSums& more, int64_t begin) {
        for (int64_t block = 0; block < blocks; block++) {
            if (!sees(block, begin, begin + kSection)) continue;
            const int64_t at = block * kTileRows, sums_at = at * a.dim;
            const Vec before = load(whole.peak + at), here = load(more.peak + at), peak = max_vec(before, here);
            const auto factor = [&](Vec of) { return select((IntVec)(of == peak), broadcast(1.0f), exp_vec((of - peak) / kLog2E)); };
            const Vec keep = factor(before), take = factor(here);
            store(whole.peak + at, peak);
            store(whole.total + at, fma(load(more.total + at), take, load(whole.total + at) * keep));
            for (int64_t d = 0; d < a.dim * kWidth; d += kWidth) {
                float* sums = whole.sums + sums_at + d;
                store(sums, fma(load(more.sums + sums_at + d), take, load(sums) * keep));
            }
        }
    }

    void start_whole() {
        for (int64_t i = 0; i < blocks * kTileRows; i += kWidth) {
            store(whole.peak + i, broadcast(-__builtin_inff()));
            store(whole.total + i, Vec{});
        }
        __builtin_memset(whole.sums, 0, blocks * kTileRows * a.dim * sizeof(float));
    }

    void finish(const BlockSums& of) {
        for (int64_t block = 0; block < blocks; block++) {
            const Vec share = 1.0f / load(of.total + block * kTileRows);
            float* out[kTileRows];
            each_row(block, [&](int64_t lane, int64_t token, int64_t head) {
                out[lane] = a.out + ((span.first_token + token) * a.heads + span.kv_head * group + head) * a.dim;
            });
            for (int64_t d = 0; d < a.dim; d += kWidth) {
                Vec v[kWidth];
                for (int64_t i = 0; i < kWidth; i++) v[i] = load(of.sums + (block * a.dim + d + i) * kWidth) * share;
                transpose(v);
                for (int64_t lane = 0; lane < kTileRows; lane++) store(out[lane] + d, v[lane]);
            }
        }
    }

    // Where a section's sums wait for those of the others.
    BlockSums kept(int64_t at) const {
        float* part = span.parts + at * blocks * kTileRows * (a.dim + 2);
        return {part, part + blocks * kTileRows * a.dim, part + blocks * kTileRows * (a.dim + 1)};
    }

    void run(TilesAhead<bf16>& tiles) {
        const int64_t first = first_base(), end = last_base();
        if (first > end) return;
        find_positions();
        take_queries();
        const bool is_one = span.parts == nullptr && first / kSection == end / kSection;
        if (span.parts == nullptr && !is_one) start_whole();
        load_attention_shapes();
        for (int64_t base = first; base <= end;) {
            const int64_t begin = base / kSection * kSection;
            if (span.parts != nullptr) section = kept(base / kSection);
            start_section();
            for (; base <= end && base < begin + kSection; base += kTile) tile(base, tiles);
            if (span.parts == nullptr && !is_one) add_section(section, begin);
        }
        _tile_release();
        if (span.parts == nullptr) finish(is_one ? section : whole);
    }

    void merge() {
        find_positions();
        start_whole();
        const int64_t first = seen_from(first_position) / kSection, last = last_position() / kSection;
        for (int64_t at = first; at <= last; at++) add_section(kept(at), at * kSection);
        finish(whole);
    }
};

INLINE bool fits_tiles(const AttentionArgs& a) { return a.cache_dtype == kBFloat16 && a.dim % kStrip == 0; }

}  // namespace
