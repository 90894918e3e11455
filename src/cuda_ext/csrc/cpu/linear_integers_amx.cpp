// Compiled for AVX-512, VNNI and AMX where the compiler knows them; else there is nothing in it.
#include "linear_integers_amx.h"

#if defined(__AMX_BF16__)
#include "arena.h"
#include "linear_plan.h"
#include "parallel.h"
#include "tile_weights.h"
#include "transpose.h"

namespace {

constexpr int64_t kMostTiles = 6;             // of rows, whose sums stay in tiles
constexpr int64_t kRing = 8;                  // strips whose weights wait for their use
constexpr int64_t kBytesAhead = 3072;         // of weights that are asked of the memory before they are unpacked
constexpr int64_t kItemsAThread = 2;          // so that a thread that is held up has less to do
constexpr int64_t kItemsOfBlocks = 4;         // the same where rows are cut too: blocks seldom go round evenly
constexpr int64_t kProductsAnItem = 1 << 15;  // below, handing it out costs more than it saves

struct Scratch {
    alignas(64) Narrow ring[kRing][kTileWords];
    alignas(64) float sums[kMostTiles][kPanel][kTileRows];
};

Scratch& scratch() {
    static thread_local Scratch memory;
    return memory;
}

// Rows of x in bfloat16, 16 at a time: for each strip 16 pairs of inputs, and for each pair the rows side by side.
struct NarrowRows {
    Narrow* words;
    int64_t strips;
    Narrow* tile(int64_t index) const { return words + index * strips * kTileWords; }
    int64_t tile_bytes() const { return strips * kTileWords * int64_t(sizeof(Narrow)); }
};

// From a pair of inputs to the next one: the pairs of a single row follow each other.
INLINE int64_t line_bytes(int64_t rows) { return rows == 1 ? 4 : kTileLine; }

INLINE IntVec pairs_of(const float* x, int64_t inputs) {
    const Vec low = load_n(x, min_of(inputs, kWidth));
    const Vec high = inputs > kWidth ? load_n(x + kWidth, min_of(inputs - kWidth, kWidth)) : Vec{};
    return (IntVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

INLINE void narrow_rows(const LinearArgs& a, int64_t first, int64_t count, Narrow* to) {
    for (int64_t input = 0; input < a.inputs; input += kStrip, to += kTileWords) {
        const auto pairs = [&](int64_t row) { return pairs_of(a.x + (first + row) * a.row_stride + input, a.inputs - input); };
        if (a.rows == 1) {
            _mm512_store_si512(to, (__m512i)pairs(0));
            continue;
        }
        Vec v[kTileRows];
        for (int64_t i = 0; i < kTileRows; i++) v[i] = i < count ? (Vec)pairs(i) : Vec{};
        transpose(v);
        for (int64_t i = 0; i < kTileRows; i++) _mm512_store_si512(to + i * 2 * kTileRows, (__m512i)v[i]);
    }
}

// The strips of panels that follow each other, made bfloat16 some time before they are used: what was just stored is slow
// to come.
template <typename Block>
class Stream {
  public:
    INLINE Stream(const uint8_t* at, int64_t strips, Narrow (*ring)[kTileWords]) : at_(at), left_(strips), ring_(ring) {
        factors_[0].read(at_);
        for (int i = 0; i < kRing / 2; i++) make();
    }
    INLINE const Narrow* next() {
        make();
        return ring_[used_++ % kRing];
    }

  private:
    INLINE void make() {
        if (left_ == 0) return;
        Block::fetch(at_ + kBytesAhead);
        if (--left_) factors_[(made_ + 1) % 2].read(at_ + Block::kBytes);
        Block::unpack(at_, factors_[made_ % 2], ring_[made_ % kRing]);
        at_ += Block::kBytes;
        made_++;
    }

    typename Block::Factors factors_[2];
    const uint8_t* at_;
    int64_t left_;
    uint64_t made_ = 0, used_ = 0;
    Narrow (*ring_)[kTileWords];
};

struct Item {
    int64_t first_tile, last_tile, first_panel, last_panel;
};

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
INLINE void multiply_panel(const NarrowRows& x, int64_t line, Stream<Block>& stream, float (*sums)[kPanel][kTileRows]) {
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

// Columns of the sums to rows of out.
INLINE void store_panel(const LinearArgs& a, int64_t first_row, int64_t rows, int64_t panel, const float (*sums)[kPanel][kTileRows]) {
    const int64_t output = panel * kPanel, n = min_of(kPanel, a.outputs - output);
    const Vec bias = a.bias ? load_n(a.bias + output, n) : Vec{};
    const auto put = [&](int64_t row, Vec sum) {
        store_n(a.out + (first_row + row) * a.out_stride + output, a.bias ? sum + bias : sum, n);
    };
    if (a.rows == 1) return put(0, load(sums[0][0]));
    for (int64_t first = 0; first < rows; first += kTileRows) {
        Vec v[kTileRows];
        for (int64_t k = 0; k < kPanel; k++) v[k] = load(sums[first / kTileRows][k]);
        transpose(v);
        for (int64_t k = 0; k < min_of(kTileRows, rows - first); k++) put(first + k, v[k]);
    }
}

template <typename Block, int Tiles>
void multiply(const LinearArgs& a, const NarrowRows& x, const Item& item) {
    Scratch& s = scratch();
    const int64_t first_row = item.first_tile * kTileRows, rows = min_of(a.rows, item.last_tile * kTileRows) - first_row;
    const int64_t line = line_bytes(a.rows), panel_bytes = x.strips * Block::kBytes;
    load_shapes(rows);
    Stream<Block> stream(static_cast<const uint8_t*>(a.panels) + item.first_panel * panel_bytes,
                         (item.last_panel - item.first_panel) * x.strips, s.ring);
    for (int64_t panel = item.first_panel; panel < item.last_panel; panel++) {
        if (Tiles == 1 && panel % 2)
            multiply_panel<Tiles, Tiles == 1>(x, line, stream, s.sums);
        else
            multiply_panel<Tiles, 0>(x, line, stream, s.sums);
        store_panel(a, first_row, rows, panel, s.sums);
    }
    _tile_release();
}

// The number of tiles becomes a constant.
template <typename Block, int Tiles = kMostTiles>
void multiply_tiles(const LinearArgs& a, const NarrowRows& x, const Item& item) {
    if constexpr (Tiles > 1)
        if (item.last_tile - item.first_tile < Tiles) return multiply_tiles<Block, Tiles - 1>(a, x, item);
    multiply<Block, Tiles>(a, x, item);
}

// x: the item's rows.
void multiply_item(const LinearArgs& a, const NarrowRows& x, const Item& item) {
    if (a.bits == 4)
        (a.has_offset ? multiply_tiles<TileBlock<4, 32, true>> : multiply_tiles<TileBlock<4, 32, false>>)(a, x, item);
    else if (a.group == 32)
        (a.has_offset ? multiply_tiles<TileBlock<8, 32, true>> : multiply_tiles<TileBlock<8, 32, false>>)(a, x, item);
    else
        (a.has_offset ? multiply_tiles<TileBlock<8, 16, true>> : multiply_tiles<TileBlock<8, 16, false>>)(a, x, item);
}

// Up to 16 rows. Every thread makes them bfloat16 for itself: to fetch them from another's cache takes longer.
int multiply_few(const LinearArgs& a, NarrowRows x) {
    static Arena memory;
    const int64_t panels = (a.outputs + kPanel - 1) / kPanel, useful = a.rows * a.inputs * a.outputs / kProductsAnItem;
    const int64_t pieces = pieces_of(1, kItemsAThread, useful, panels);
    x.words = reinterpret_cast<Narrow*>(memory.reserve(thread_count() * x.tile_bytes()));
    if (!x.words) return kNoMemory;
    bool is_narrow[kMostThreads] = {};
    parallel_items(pieces, true, [&](int64_t piece, int thread) {
        const NarrowRows own{x.tile(thread), x.strips};
        if (!is_narrow[thread]) narrow_rows(a, 0, a.rows, own.words);
        is_narrow[thread] = true;
        multiply_item(a, own, {0, 1, cut(panels, piece, pieces), cut(panels, piece + 1, pieces)});
    });
    return kOk;
}

int multiply_many(const LinearArgs& a, NarrowRows x) {
    static Arena memory;
    const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
    x.words = reinterpret_cast<Narrow*>(memory.reserve(tiles * x.tile_bytes()));
    if (!x.words) return kNoMemory;
    parallel_ranges(tiles, (1 << 11) / at_least_one(a.inputs) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; tile++)
            narrow_rows(a, tile * kTileRows, min_of(kTileRows, a.rows - tile * kTileRows), x.tile(tile));
    });
    const int64_t blocks = (tiles + kMostTiles - 1) / kMostTiles, panels = (a.outputs + kPanel - 1) / kPanel;
    const int64_t useful = a.rows * a.inputs * a.outputs / kProductsAnItem / blocks;
    const int64_t pieces = pieces_of(blocks, kItemsOfBlocks, useful, panels);
    parallel_items(blocks * pieces, true, [&](int64_t index, int) {
        const int64_t block = index / pieces, piece = index % pieces, first = cut(tiles, block, blocks);
        multiply_item(a, {x.tile(first), x.strips},
                      {first, cut(tiles, block + 1, blocks), cut(panels, piece, pieces), cut(panels, piece + 1, pieces)});
    });
    return kOk;
}

}  // namespace

int linear_integers_amx(const LinearArgs& a) {
    const NarrowRows x{nullptr, strips_of(a.inputs)};
    return a.rows <= kTileRows ? multiply_few(a, x) : multiply_many(a, x);
}

#else

int linear_integers_amx(const LinearArgs&) { return kNoMemory; }

#endif
