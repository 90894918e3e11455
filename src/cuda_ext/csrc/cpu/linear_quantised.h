// x · weightᵀ + bias where both are integers (quantised.h): each group's products are added up exactly, and each result is
// one chain over the groups in their order, two fused multiply-adds a group (one without offsets), then over the outliers in
// theirs, the bias last. So it depends neither on the other rows nor on the number of threads nor on the level.
#pragma once

#include "linear_plan.h"
#include "quantised.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

constexpr int kPanelVecs = int(kPanel) / kWidth;
constexpr int64_t kFetchAhead = 4096;  // bytes of weights, of one panel at a time, asked of the memory before they are needed
constexpr int64_t kGroupsAnAsk = 2;    // of two panels at a time

// A group of activations of some rows that lie one after the other.
struct GroupOfRows {
    const char* group;  // the first row's
    int64_t row_bytes;

    INLINE const QuantisedGroup& at(int64_t row) const {
        return *reinterpret_cast<const QuantisedGroup*>(group + row * row_bytes);
    }
    INLINE GroupOfRows next() const { return {group + sizeof(QuantisedGroup), row_bytes}; }
};

INLINE IntVec load_line(const uint8_t* p) {
    IntVec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// --- sums of products of codes: weights w against activations x, four inputs a lane ---

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#if defined(__AVX512F__)
typedef __m512i Bytes;
INLINE Bytes multiply_add_bytes(Bytes u, Bytes s) { return _mm512_maddubs_epi16(u, s); }
INLINE Bytes add_words(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
INLINE IntVec widen_words(Bytes a) { return (IntVec)_mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
#else
typedef __m256i Bytes;
INLINE Bytes multiply_add_bytes(Bytes u, Bytes s) { return _mm256_maddubs_epi16(u, s); }
INLINE Bytes add_words(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
INLINE IntVec widen_words(Bytes a) { return (IntVec)_mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
#endif
#endif

// Unsigned weights against signed activations.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Weights from 0 to 15. Up to 8 calls of add for one group.
struct SmallDot {
    Bytes sum = {};  // 16 bits a lane: 8 · 2 · 15 · 128 fits
    INLINE void add(IntVec w, IntVec x) { sum = add_words(sum, multiply_add_bytes((Bytes)w, (Bytes)x)); }
    INLINE IntVec total() const { return widen_words(sum); }
};

// Weights from 0 to 255: 16 bits hold two products of 8 bits with 7, but not more, so their low and high halves apart.
struct WideDot {
    SmallDot low, high;
    INLINE void add(IntVec w, IntVec x) {
        low.add(w & 0x0f0f0f0f, x);
        high.add(w >> 4 & 0x0f0f0f0f, x);
    }
    INLINE IntVec total() const { return low.total() + (high.total() << 4); }
};
#else
// 32 bits a lane: weights of any size.
struct WideDot {
    IntVec sum = {};
    INLINE void add(IntVec w, IntVec x) {
#if defined(__AVX512VNNI__)
        sum = (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
        for (int byte = 0; byte < 4; byte++) sum += (w >> (8 * byte) & 0xff) * (x << (24 - 8 * byte) >> 24);
#endif
    }
    INLINE IntVec total() const { return sum; }
};
typedef WideDot SmallDot;
#endif

// Four activations for every lane.
template <typename Dot>
INLINE void add_word(Dot& dot, IntVec w, const int8_t* x) {
#if defined(__AVX512VNNI__)
    // Out of memory: compilers load all words of a group before they use any, more than there are registers.
    typedef int32_t Word __attribute__((may_alias, aligned(1)));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(dot.sum) : "v"(w), "m"(*reinterpret_cast<const Word*>(x)));
#else
    dot.add(w, broadcast_word(x));
#endif
}

template <int Bits>
struct DotOf {
    typedef WideDot Type;
};

template <>
struct DotOf<4> {
    typedef SmallDot Type;
};

// --- a tile: some rows against one panel ---

// What one tile of rows asks the memory for of the weights of the next two panels, every kGroupsAnAsk groups.
struct NextWeights {
    const uint8_t* at;
    int64_t lines;

    INLINE void ask() {
        for (int64_t i = 0; i < lines; i++, at += kLine) __builtin_prefetch(at);
    }
};

template <int Bits, int Group, bool HasOffset>
struct QuantisedBlock {
    static constexpr WeightFormat kFormat{Bits, Group, HasOffset};
    static constexpr int kLines = kFormat.lines();

    // Of the r-th row, loaded once for all sides.
    template <int Sides, typename Dots>
    static INLINE void add_to_row(Dots& dots, int r, const IntVec (&w)[Sides], const int8_t* x) {
        if constexpr (Sides == 1) {
            add_word(dots[0][r], w[0], x);
        } else {
            const IntVec word = broadcast_word(x);
#pragma GCC unroll 2
            for (int side = 0; side < Sides; side++) dots[side][r].add(w[side], word);
        }
    }

    // Sums of products of blocks of Sides panels, ``apart`` bytes from one to the next, with Rows rows, for the panels'
    // vec-th vector of outputs. at: of the blocks' first input in the activations' group.
    template <int Rows, int Sides>
    static INLINE void products(const uint8_t* block, int64_t apart, const GroupOfRows& x, int at, int vec,
                                IntVec (&sums)[Sides][Rows]) {
        const uint8_t* line = block + vec * kWidth * 4;
        typename DotOf<Bits>::Type dots[Sides][Rows];
#pragma GCC unroll 8
        for (int i = 0; i < kLines; i++) {
            IntVec first[Sides], second[Sides];
#pragma GCC unroll 2
            for (int side = 0; side < Sides; side++) {
                const IntVec codes = load_line(line + side * apart + i * kLine);
                first[side] = Bits == 4 ? codes & 0x0f0f0f0f : codes;
                second[side] = codes >> 4 & 0x0f0f0f0f;
            }
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++) {
                add_to_row<Sides>(dots, r, first, x.at(r).codes + at + 4 * i);
                if constexpr (Bits == 4) add_to_row<Sides>(dots, r, second, x.at(r).codes + 4 * i + 16);
            }
        }
#pragma GCC unroll 2
        for (int side = 0; side < Sides; side++)
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++) sums[side][r] = dots[side][r].total();
    }

    // scale · sum of a row's codes, and zero · that sum without its scale.
    static INLINE float scaled_sum(const QuantisedGroup& x, int at) {
        return Group == 16 ? x.scale * float(half_sum(x, at)) : x.scaled_sum;
    }
    static INLINE int32_t zero_sum(const QuantisedGroup& x, int at) {
        return Group == 16 ? kFormat.zero() * half_sum(x, at) : Bits == 8 ? x.sum_128 : x.sum_8;
    }
    static INLINE int32_t half_sum(const QuantisedGroup& x, int at) {
        return at == 0 ? x.first_sum : x.sum_8 / 8 - x.first_sum;
    }

    template <int Rows, int Sides>
    static INLINE void add_block(const uint8_t* block, int64_t apart, const GroupOfRows& x, int at,
                                 Vec (&sums)[Sides][kPanelVecs][Rows]) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; v++) {
            IntVec products_of[Sides][Rows];
            products<Rows, Sides>(block, apart, x, at, v, products_of);
#pragma GCC unroll 2
            for (int side = 0; side < Sides; side++) {
                const uint8_t* scales = block + side * apart + kLines * kLine;
                Vec(&sum)[Rows] = sums[side][v];
                const Vec scale = load_half_precision(scales + v * kWidth * 2);
#pragma GCC unroll 8
                for (int r = 0; r < Rows; r++) {
                    if constexpr (kFormat.zero() != 0) products_of[side][r] -= zero_sum(x.at(r), at);
                    sum[r] = fused(__builtin_convertvector(products_of[side][r], Vec), scale * x.at(r).scale, sum[r]);
                }
                if constexpr (HasOffset) {
                    const Vec offset = load_half_precision(scales + 32 + v * kWidth * 2);
#pragma GCC unroll 8
                    for (int r = 0; r < Rows; r++) sum[r] = fused(offset, broadcast(scaled_sum(x.at(r), at)), sum[r]);
                }
            }
        }
    }

    // Of a panel's vec-th vector of outputs, the weights in a column.
    static INLINE Vec column_weights(const uint8_t* panel, const OutlierColumn& column, int vec) {
        const IntVec codes = load_line(panel + column.word + vec * kWidth * 4) >> column.shift & ((1 << Bits) - 1);
        const Vec steps = __builtin_convertvector(codes - kFormat.zero(), Vec);
        const uint8_t* scales = panel + column.scales + vec * kWidth * 2;
        const Vec scale = load_half_precision(scales);
        return HasOffset ? fused(steps, scale, load_half_precision(scales + 32)) : steps * scale;
    }

    // Of Sides panels from the panel-th on.
    template <int Rows, int Sides>
    static __attribute__((noinline)) void tile(const QuantisedLinearArgs& a, const OutlierColumn* column,
                                               const OutlierColumn* columns_end, int64_t row, int64_t panel,
                                               NextWeights next, AskAhead* ask) {
        constexpr int64_t bytes = kFormat.block_bytes();
        const int64_t groups = QuantisedRow::count(a.inputs), apart = kFormat.panel_bytes(a.inputs);
        const uint8_t* const first = static_cast<const uint8_t*>(a.panels) + panel * apart;
        const uint8_t* block = first;
        GroupOfRows x{reinterpret_cast<const char*>(QuantisedRow::at(a.x, row, a.inputs).groups), QuantisedRow::bytes(a.inputs)};
        Vec sums[Sides][kPanelVecs][Rows] = {};
        for (int64_t group = 0; group < groups;) {
            const int64_t end = min_of(groups, group + kGroupsAnAsk);
            if (ask) ask->ask();
            if constexpr (Sides > 1) next.ask();
            for (; group < end; group++, x = x.next())
#pragma GCC unroll 2
                for (int at = 0; at < kGroup; at += Group) {
                    if constexpr (Sides == 1)
                        for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(block + kFetchAhead + i);
                    add_block<Rows, Sides>(block, apart, x, at, sums);
                    block += bytes;
                }
        }
        for (; column < columns_end; column++)
#pragma GCC unroll 2
            for (int side = 0; side < Sides; side++)
#pragma GCC unroll 4
                for (int v = 0; v < kPanelVecs; v++) {
                    const Vec weights = column_weights(first + side * apart, *column, v);
#pragma GCC unroll 8
                    for (int r = 0; r < Rows; r++)
                        sums[side][v][r] = fused(weights, broadcast(column->values[r]), sums[side][v][r]);
                }
#pragma GCC unroll 2
        for (int side = 0; side < Sides; side++)
#pragma GCC unroll 4
            for (int v = 0; v < kPanelVecs; v++) {
                const int64_t output = (panel + side) * kPanel + v * kWidth, n = min_of(kWidth, a.outputs - output);
                if (n <= 0) continue;
                const Vec bias = a.bias ? load_n(a.bias + output, n) : Vec{};
#pragma GCC unroll 8
                for (int r = 0; r < Rows; r++) {
                    const Vec sum = a.bias ? sums[side][v][r] + bias : sums[side][v][r];
                    store_n(a.out + (row + r) * a.out_stride + output, sum, n);
                }
            }
    }

    // The number of rows becomes a constant.
    template <int Rows, int Sides>
    static INLINE void tile_of(int64_t count, const QuantisedLinearArgs& a, const OutlierColumn* columns,
                               const OutlierColumn* columns_end, int64_t row, int64_t panel, NextWeights next, AskAhead* ask) {
        if constexpr (Rows > 1)
            if (count < Rows) return tile_of<Rows - 1, Sides>(count, a, columns, columns_end, row, panel, next, ask);
        tile<Rows, Sides>(a, columns, columns_end, row, panel, next, ask);
    }

    // Of a tile of ``count`` rows, group by group; returns the end of what it wrote. A row has one column of a group at most,
    // so that their order within a group is nothing to its results.
    static INLINE OutlierColumn* find_columns(const QuantisedLinearArgs& a, int64_t row, int64_t count, OutlierColumn* to) {
        typedef uint8_t Places __attribute__((vector_size(QuantisedRow::kPlacesAtOnce), aligned(1), may_alias));
        QuantisedRow rows[OutlierColumn::kRows];
        for (int64_t r = 0; r < OutlierColumn::kRows; r++) rows[r] = QuantisedRow::at(a.x, row + (r < count ? r : 0), a.inputs);
        for (int64_t from = 0; from < QuantisedRow::count(a.inputs); from += QuantisedRow::kPlacesAtOnce) {
            Places all = *reinterpret_cast<const Places*>(rows[0].places + from);
            for (int64_t r = 1; r < count; r++) all &= *reinterpret_cast<const Places*>(rows[r].places + from);
            for (int64_t i = 0; i < QuantisedRow::kPlacesAtOnce; i++)
                if (all[i] != kNoOutlier) to = find_columns_of_group(rows, count, from + i, to);
        }
        return to;
    }

    static INLINE OutlierColumn* find_columns_of_group(const QuantisedRow (&rows)[OutlierColumn::kRows], int64_t count,
                                                       int64_t group, OutlierColumn* to) {
        uint32_t left = 0;
        for (int64_t r = 0; r < count; r++) left |= uint32_t(rows[r].places[group] != kNoOutlier) << r;
        for (; left; to++) {
            const int place = rows[__builtin_ctz(left)].places[group];
            const int64_t block = (group * kGroup + place) / Group * kFormat.block_bytes();
            const auto [byte, upper] = kFormat.place(0, place % Group, false);
            to->word = int32_t(block + byte / kLine * kLine);
            to->scales = int32_t(block + kLines * kLine);
            to->shift = int32_t(byte % 4 * 8 + (upper ? 4 : 0));
#pragma GCC unroll 8
            for (int r = 0; r < OutlierColumn::kRows; r++) {
                const bool has_it = rows[r].places[group] == place;
                to->values[r] = has_it ? rows[r].outliers[group] : 0.0f;
                left &= ~(uint32_t(has_it) << r);
            }
        }
        return to;
    }
};

constexpr int kTileRows = kWidth == 16 ? 8 : kWidth == 8 ? 4 : 2;
// Of tiles of two panels, which load each word of activations once for both; 0 where registers are too few. With one panel
// loads take as long as the products.
constexpr int kPairRows = kWidth == 16 ? 6 : 0;
static_assert(kTileRows <= OutlierColumn::kRows && kPairRows <= OutlierColumn::kRows, "a column holds a tile's rows");

// How rows [first_row, last_row) are cut into tiles.
struct QuantisedTiles {
    int64_t first_row, rows;
    bool in_pairs;
    int64_t count;

    QuantisedTiles(int64_t first, int64_t last) : first_row(first), rows(last - first) {
        in_pairs = kPairRows > 0 && rows > kTileRows;
        const int64_t most = in_pairs ? kPairRows : kTileRows;
        count = (rows + most - 1) / most;
    }
    int64_t first_of(int64_t tile) const { return first_row + rows * tile / count; }
    int64_t rows_of(int64_t tile) const { return first_of(tile + 1) - first_of(tile); }
};

// They come evenly, over all tiles: a core waits for so many lines at a time, and with them for the cache's.
template <typename Block>
INLINE NextWeights next_weights(Block, const QuantisedLinearArgs& a, int64_t panel, int64_t tile, int64_t tiles) {
    const int64_t bytes = 2 * Block::kFormat.panel_bytes(a.inputs);
    const int64_t asks = (QuantisedRow::count(a.inputs) + kGroupsAnAsk - 1) / kGroupsAnAsk;
    const int64_t lines = (bytes + kLine * asks * tiles - 1) / (kLine * asks * tiles);
    const auto* next = static_cast<const uint8_t*>(a.panels) + panel * (bytes / 2) + bytes;
    return {next + tile * asks * lines * kLine, lines};
}

template <typename Block>
void quantised_span(Block, const QuantisedLinearArgs& a, const QuantisedSpan& span) {
    const QuantisedTiles tiles(span.first_row, span.last_row);
    const OutlierColumn* const* columns = span.columns;
    int64_t panel = span.first_panel;
    if constexpr (kPairRows > 0)
        for (; tiles.in_pairs && panel + 1 < span.last_panel; panel += 2)
            for (int64_t tile = 0; tile < tiles.count; tile++) {
                const NextWeights next = next_weights(Block(), a, panel, tile, tiles.count);
                Block::template tile_of<kPairRows, 2>(tiles.rows_of(tile), a, columns[tile], columns[tile + 1],
                                                      tiles.first_of(tile), panel, next, span.ahead);
            }
    for (; panel < span.last_panel; panel++)
        for (int64_t tile = 0; tile < tiles.count; tile++)
            Block::template tile_of<kTileRows, 1>(tiles.rows_of(tile), a, columns[tile], columns[tile + 1],
                                                  tiles.first_of(tile), panel, NextWeights{}, nullptr);
}

// Calls use with the block of a's format.
template <typename Use>
INLINE void with_quantised_block(const QuantisedLinearArgs& a, Use use) {
    if (a.bits == 4 && a.has_offset)
        use(QuantisedBlock<4, 32, true>());
    else if (a.bits == 4)
        use(QuantisedBlock<4, 32, false>());
    else if (a.group == 32 && a.has_offset)
        use(QuantisedBlock<8, 32, true>());
    else if (a.group == 32)
        use(QuantisedBlock<8, 32, false>());
    else if (a.has_offset)
        use(QuantisedBlock<8, 16, true>());
    else
        use(QuantisedBlock<8, 16, false>());
}

void linear_quantised(const QuantisedLinearArgs& a, const QuantisedSpan& span) {
    with_quantised_block(a, [&](auto block) { quantised_span(block, a, span); });
}

// Of rows [first, last): writes the columns to ``to`` and where those of each tile begin to ``begins``.
void find_outliers(const QuantisedLinearArgs& a, int64_t first, int64_t last, OutlierColumn* to, const OutlierColumn** begins) {
    const QuantisedTiles tiles(first, last);
    with_quantised_block(a, [&](auto block) {
        begins[0] = to;
        for (int64_t tile = 0; tile < tiles.count; tile++)
            begins[tile + 1] = to = block.find_columns(a, tiles.first_of(tile), tiles.rows_of(tile), to);
    });
}

}  // namespace
