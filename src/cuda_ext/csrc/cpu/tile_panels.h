// Panels of integer weights against rows in bfloat16, on the tiles of AMX: what linear_integers_amx.cpp and
// gated_linear_amx.cpp share. What becomes of the sums is theirs.
#pragma once

#include "arena.h"
#include "linear_plan.h"
#include "parallel.h"
#include "tile_weights.h"
#include "transpose.h"

namespace {

constexpr int64_t kBytesAhead = 3072;          // of weights that are asked of the memory before they are unpacked
constexpr int64_t kMostTiles = 6;              // of few rows, whose sums stay in tiles
constexpr int64_t kMostOfMany = 32;            // tiles of rows of an item
constexpr int64_t kMostRowBytes = 800 << 10;   // of an item's rows: they stay in the second-level cache
constexpr int64_t kPartStrips = 9;             // two panels' weights of them leave the first-level cache room for rows
constexpr int64_t kRing = 8;                   // strips whose weights wait for their use
constexpr int64_t kItemsAThread = 2;           // so that a thread that is held up has less to do
constexpr int64_t kItemsOfBlocks = 4;          // the same for many rows
constexpr int64_t kProductsAnItem = 1 << 15;   // below, handing it out costs more than it saves

typedef float Sums[kPanel][kTileRows];

// Rows in bfloat16, 16 at a time: for each strip 16 pairs of inputs, and for each pair the rows side by side; the pairs of
// a single row follow each other.
struct NarrowRows {
    Narrow* words;
    int64_t strips;
    Narrow* tile(int64_t index) const { return words + index * strips * kTileWords; }
    int64_t tile_bytes() const { return strips * kTileWords * int64_t(sizeof(Narrow)); }
};

// Panels lie one behind the other; or, where there are ``others``, those take turns with them.
struct Panels {
    const uint8_t* first;
    const uint8_t* others;
    int64_t bytes, count;
    const uint8_t* at(int64_t panel) const {
        if (!others) return first + panel * bytes;
        return (panel % 2 ? others : first) + panel / 2 * bytes;
    }
};

// What is multiplied: rows of floats, or where x is null rows that are narrow already.
struct Product {
    const float* x;
    Narrow* narrow;
    Panels panels;
    int64_t rows, inputs, row_stride, bits, group, has_offset;
};

struct Item {
    int64_t first_tile, last_tile, first_panel, last_panel;
};

// The sums of some tiles of rows with Put::kPanels panels: those of the first panel, then those of the next one.
struct TileSums {
    int64_t tile, tiles, panel;
    const Sums* sums;
};

struct Scratch {
    alignas(64) Narrow ring[kRing][kTileWords];
    alignas(64) Sums sums[2 * kMostTiles];
    alignas(64) Narrow weights[2][kPartStrips][kTileWords];
    alignas(64) Sums held[kMostOfMany / 2][4];  // between the parts
};

INLINE Scratch& scratch() {
    static thread_local Scratch memory;
    return memory;
}

// --- rows ---

INLINE int64_t line_bytes(int64_t rows) { return rows == 1 ? 4 : kTileLine; }

INLINE IntVec pairs_of(const float* x, int64_t inputs) {
    const Vec low = load_n(x, min_of(inputs, kWidth));
    const Vec high = inputs > kWidth ? load_n(x + kWidth, min_of(inputs - kWidth, kWidth)) : Vec{};
    return (IntVec)narrow_both(low, high);
}

INLINE void narrow_rows(const Product& p, int64_t first, int64_t count, Narrow* to) {
    for (int64_t input = 0; input < p.inputs; input += kStrip, to += kTileWords) {
        const auto pairs = [&](int64_t row) { return pairs_of(p.x + (first + row) * p.row_stride + input, p.inputs - input); };
        if (p.rows == 1) {
            _mm512_store_si512(to, (__m512i)pairs(0));
            continue;
        }
        Vec v[kTileRows];
        for (int64_t i = 0; i < kTileRows; i++) v[i] = i < count ? (Vec)pairs(i) : Vec{};
        transpose(v);
        for (int64_t i = 0; i < kTileRows; i++) _mm512_store_si512(to + i * 2 * kTileRows, (__m512i)v[i]);
    }
}

// --- weights ---

// The strips of some panels, one panel after the other, made bfloat16 some time before they are used: what was just
// stored is slow to come.
template <typename Block>
class Stream {
  public:
    INLINE Stream(const Panels& panels, const Item& item, int64_t strips, Narrow (*ring)[kTileWords])
        : panels_(panels), strips_(strips), panel_(item.first_panel), last_(item.last_panel), ring_(ring) {
        begin_panel();
        factors_[0].read(at_);
        for (int i = 0; i < kRing / 2; i++) make();
    }
    INLINE const Narrow* next() {
        make();
        return ring_[used_++ % kRing];
    }

  private:
    INLINE void make() {
        if (panel_ == last_) return;
        const uint8_t* strip = at_;
        Block::fetch(strip + kBytesAhead < end_ ? strip + kBytesAhead : next_ + (strip + kBytesAhead - end_));
        at_ += Block::kBytes;
        if (at_ == end_) {
            panel_++;
            if (panel_ < last_) begin_panel();
        }
        if (panel_ < last_) factors_[(made_ + 1) % 2].read(at_);
        Block::unpack(strip, factors_[made_ % 2], ring_[made_ % kRing]);
        made_++;
    }
    INLINE void begin_panel() {
        at_ = panels_.at(panel_);
        end_ = at_ + strips_ * Block::kBytes;
        next_ = panels_.at(panel_ + 1);
    }

    typename Block::Factors factors_[2];
    const Panels& panels_;
    const uint8_t* at_;
    const uint8_t* end_;
    const uint8_t* next_;  // panel
    int64_t strips_, panel_, last_;
    uint64_t made_ = 0, used_ = 0;
    Narrow (*ring_)[kTileWords];
};

// --- products of few rows ---

// Tiles: sums 0 to 5, rows 6, weights 7. They are named by literals: DO(sums), for each tile of rows; the panels of a single
// one take turns at two.
#define EACH_TILE(DO)                   \
    if constexpr (Turn == 0) { DO(0) }  \
    if constexpr (Turn == 1) { DO(1) }  \
    if constexpr (Tiles > 1) { DO(1) }  \
    if constexpr (Tiles > 2) { DO(2) }  \
    if constexpr (Tiles > 3) { DO(3) }  \
    if constexpr (Tiles > 4) { DO(4) }  \
    if constexpr (Tiles > 5) { DO(5) }
#define ZERO_SUMS(SUMS) _tile_zero(SUMS);
#define STORE_SUMS(SUMS) _tile_stored(SUMS, sums[SUMS % Tiles], line);
#define ADD_PRODUCTS(SUMS)                                                     \
    _tile_loadd(6, x.tile(SUMS % Tiles) + strip * kTileWords, line);           \
    _tile_dpbf16ps(SUMS, 7, 6);

INLINE void load_shapes(int64_t rows) {
    TileShapes shapes;
    for (int tile = 0; tile < 7; tile++) shapes.set(tile, kTileRows, 4 * min_of(rows, kTileRows));
    shapes.set(7, kTileRows, kTileLine);
    _tile_loadconfig(&shapes);
}

// One panel against some tiles of rows. sums: a line an output.
template <int Tiles, int Turn, typename Block>
INLINE void multiply_panel(const NarrowRows& x, int64_t line, Stream<Block>& stream, Sums* sums) {
    EACH_TILE(ZERO_SUMS)
    for (int64_t strip = 0; strip < x.strips; strip++) {
        const Narrow* weights = stream.next();
        asm volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
        _tile_loadd(7, weights, kTileLine);
        EACH_TILE(ADD_PRODUCTS)
    }
    EACH_TILE(STORE_SUMS)
    asm volatile("" ::: "memory");
}

template <int Tiles, typename Block, typename Put>
void multiply_tiles(const Product& p, const NarrowRows& x, const Item& item, const Put& put) {
    Scratch& s = scratch();
    const int64_t line = line_bytes(p.rows);
    load_shapes(p.rows);
    Stream<Block> stream(p.panels, item, x.strips, s.ring);
    for (int64_t panel = item.first_panel; panel < item.last_panel; panel++) {
        const int64_t place = panel % Put::kPanels;
        if (Tiles == 1 && panel % 2)
            multiply_panel<Tiles, Tiles == 1>(x, line, stream, s.sums + place * Tiles);
        else
            multiply_panel<Tiles, 0>(x, line, stream, s.sums + place * Tiles);
        if (place == Put::kPanels - 1) put({item.first_tile, Tiles, panel - place, s.sums});
    }
    _tile_release();
}

// The number of tiles becomes a constant.
template <typename Block, typename Put, int Tiles = kMostTiles>
void multiply_item(const Product& p, const NarrowRows& x, const Item& item, const Put& put) {
    if constexpr (Tiles > 1)
        if (item.last_tile - item.first_tile < Tiles) return multiply_item<Block, Put, Tiles - 1>(p, x, item, put);
    multiply_tiles<Tiles, Block>(p, x, item, put);
}

// --- products of many rows with panels in pairs ---

// Two panels against two tiles of rows at a time, a part of the inputs after the other: a part's weights are made once for
// all rows of the item and stay in the first-level cache, while the rows come out of the second-level one. Between two parts
// sums are put away as they are, and so the chain of additions is that of few rows. Where float32 rows are the result, two
// threads lose more by it than they gain.

// Tiles: sums 0 to 3, weights 4 and 5, rows 6 and 7. DO(sums, their place).
#define EACH_OF_PAIR(DO)                  \
    DO(0, 0)                              \
    if constexpr (Tiles > 1) { DO(1, 1) } \
    DO(2, Tiles)                          \
    if constexpr (Tiles > 1) { DO(3, 3) }
#define ZERO_PLACE(SUMS, PLACE) _tile_zero(SUMS);
#define LOAD_PLACE(SUMS, PLACE) _tile_loadd(SUMS, from[PLACE], kTileLine);
#define STORE_PLACE(SUMS, PLACE) _tile_stored(SUMS, to[PLACE], kTileLine);

// A part of the inputs: its weights, and its strips of the first tile of rows, ``next_tile`` words before the second one's.
struct Part {
    const Narrow (*weights)[kPartStrips][kTileWords];
    const Narrow* x;
    int64_t next_tile, strips;
};

// from: the sums of the parts before, or null.
template <int Tiles>
INLINE void multiply_pair(const Part& part, const Sums* from, Sums* to) {
    asm volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
    if (from) {
        EACH_OF_PAIR(LOAD_PLACE)
    } else {
        EACH_OF_PAIR(ZERO_PLACE)
    }
    const Narrow* x = part.x;
    for (int64_t strip = 0; strip < part.strips; strip++, x += kTileWords) {
        _tile_loadd(4, part.weights[0][strip], kTileLine);
        _tile_loadd(6, x, kTileLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, part.weights[1][strip], kTileLine);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Tiles > 1) {
            _tile_loadd(7, x + part.next_tile, kTileLine);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    EACH_OF_PAIR(STORE_PLACE)
    asm volatile("" ::: "memory");
}

// next: the strips that are unpacked after these ones.
template <typename Block>
INLINE void unpack_part(const uint8_t* strip, const uint8_t* next, int64_t strips, Narrow (*to)[kTileWords]) {
    typename Block::Factors factors[2];
    factors[0].read(strip);
    for (int64_t i = 0; i < strips; i++, strip += Block::kBytes, next += Block::kBytes) {
        Block::fetch(next);
        if (i + 1 < strips) factors[(i + 1) % 2].read(strip + Block::kBytes);
        Block::unpack(strip, factors[i % 2], to[i]);
    }
}

template <typename Block, typename Put>
void multiply_many(const Product& p, const NarrowRows& x, const Item& item, const Put& put) {
    Scratch& s = scratch();
    load_shapes(p.rows);
    const int64_t tiles = item.last_tile - item.first_tile, parts = (x.strips + kPartStrips - 1) / kPartStrips;
    for (int64_t panel = item.first_panel; panel < item.last_panel; panel += 2)
        for (int64_t i = 0; i < parts; i++) {
            const int64_t first = cut(x.strips, i, parts), strips = cut(x.strips, i + 1, parts) - first;
            const bool is_last = i + 1 == parts;
            for (int64_t place = 0; place < 2; place++) {
                const uint8_t* weights = p.panels.at(panel + place) + first * Block::kBytes;
                const uint8_t* next = is_last ? p.panels.at(panel + place + 2) : weights + strips * Block::kBytes;
                unpack_part<Block>(weights, next, strips, s.weights[place]);
            }
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                const int64_t count = min_of(2, tiles - tile);
                const Part part{s.weights, x.tile(tile) + first * kTileWords, x.strips * kTileWords, strips};
                const Sums* from = i > 0 ? s.held[tile / 2] : nullptr;
                Sums* to = is_last ? s.sums : s.held[tile / 2];
                if (count == 2)
                    multiply_pair<2>(part, from, to);
                else
                    multiply_pair<1>(part, from, to);
                if (is_last) put({item.first_tile + tile, count, panel, s.sums});
            }
        }
    _tile_release();
}

template <typename Block, typename Put>
void multiply_rows(const Product& p, const NarrowRows& x, const Item& item, const Put& put) {
    if constexpr (Put::kPanels == 2)
        if (item.last_tile - item.first_tile > kMostTiles) return multiply_many<Block>(p, x, item, put);
    multiply_item<Block>(p, x, item, put);
}

// x: the item's rows. The format becomes a constant.
template <typename Put>
void multiply_format(const Product& p, const NarrowRows& x, const Item& item, const Put& put) {
    const auto with = [&](auto with_offset, auto without) { (p.has_offset ? with_offset : without)(p, x, item, put); };
    if (p.bits == 4)
        with(multiply_rows<TileBlock<4, 32, true>, Put>, multiply_rows<TileBlock<4, 32, false>, Put>);
    else if (p.group == 32)
        with(multiply_rows<TileBlock<8, 32, true>, Put>, multiply_rows<TileBlock<8, 32, false>, Put>);
    else
        with(multiply_rows<TileBlock<8, 16, true>, Put>, multiply_rows<TileBlock<8, 16, false>, Put>);
}

// Calls put(sums) for every Put::kPanels panels with every few tiles of rows, from any thread. Up to 16 rows of floats each
// thread makes bfloat16 for itself: to fetch them from another's cache takes longer.
template <typename Put>
int multiply_panels(const Product& p, const Put& put) {
    static Arena memory;
    NarrowRows x{p.narrow, strips_of(p.inputs)};
    const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows, copies = tiles > 1 ? tiles : thread_count();
    const int64_t fitting = min_of(kMostOfMany, kMostRowBytes / at_least_one(x.tile_bytes()));
    const int64_t most = Put::kPanels == 2 ? max_of(kMostTiles, fitting) : kMostTiles;
    const int64_t blocks = (tiles + most - 1) / most;
    if (p.x) x.words = reinterpret_cast<Narrow*>(memory.reserve(copies * x.tile_bytes()));
    if (!x.words) return kNoMemory;
    if (p.x && tiles > 1)
        parallel_ranges(tiles, (1 << 11) / at_least_one(p.inputs) + 1, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; tile++)
                narrow_rows(p, tile * kTileRows, min_of(kTileRows, p.rows - tile * kTileRows), x.tile(tile));
        });
    const int64_t useful = p.rows * p.inputs * p.panels.count * kPanel / kProductsAnItem / blocks;
    const int64_t groups = p.panels.count / Put::kPanels;
    const int64_t pieces = pieces_of(blocks, tiles > 1 ? kItemsOfBlocks : kItemsAThread, useful, groups);
    bool has_copy[kMostThreads] = {};
    parallel_items(blocks * pieces, true, [&](int64_t index, int thread) {
        const int64_t block = index / pieces, piece = index % pieces;
        const Item item{cut(tiles, block, blocks), cut(tiles, block + 1, blocks), cut(groups, piece, pieces) * Put::kPanels,
                        cut(groups, piece + 1, pieces) * Put::kPanels};
        const bool copies_rows = p.x && tiles == 1;
        const NarrowRows own{x.tile(copies_rows ? thread : item.first_tile), x.strips};
        if (copies_rows && !has_copy[thread]) narrow_rows(p, 0, p.rows, own.words);
        has_copy[thread] = true;
        multiply_format(p, own, item, put);
    });
    return kOk;
}

}  // namespace
