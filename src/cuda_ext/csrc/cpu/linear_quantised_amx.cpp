// Compiled for AVX-512, VNNI and AMX where the compiler knows them; else there is nothing in it.
#include "linear_quantised_amx.h"

#if defined(__AMX_INT8__)
#include "level.h"
#include "quantised_factors.h"
#include "tiles.h"

namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPlaces = 4;      // of products: loads and stores 4 KiB apart are taken for dependent
constexpr int64_t kSection = 32;    // blocks of activations that stay in the first-level cache: tiles · groups
constexpr int64_t kChunk = 24;      // panels whose sums stay in the second-level cache
constexpr int64_t kMostTileRows = 64;  // at a time
constexpr int64_t kFewRows = 4;     // up to which the vector kernel is the faster one

// Tiles: sums 0 and 1 (and 2 and 3 of W8's low parts), activations 4 and 5, weights 6 and 7.
TileShapes shapes_of(int64_t count, int bits) {
    TileShapes shapes;
    for (int tile = 0; tile < 4; tile++) shapes.set(tile, count, kTileLine);
    for (int tile = 4; tile < 6; tile++) shapes.set(tile, count, bits == 4 ? 2 * kGroup : kGroup);
    for (int tile = 6; tile < 8; tile++) shapes.set(tile, bits == 4 ? 16 : 8, kTileLine);
    return shapes;
}

struct Scratch {
    alignas(64) uint8_t weights[kSection][kTileBytes];
    alignas(64) int32_t products[kPlaces][kTileRows][kPanel];
    alignas(64) int32_t low_products[kPlaces][kTileRows][kPanel];
    alignas(64) float sums[kChunk][kMostTileRows + 1][kPanel];  // one more: panels 4 KiB apart would share cache sets
    alignas(64) int8_t codes[kMostFactors][2 * kGroup];  // a tile for each block of inputs of each tile of rows
};

Scratch& scratch() {
    static thread_local Scratch memory;
    return memory;
}

// A W4 block as a tile: 16 · weight for the high parts of the activations, weight for the low ones.
INLINE void unpack(const uint8_t* block, uint8_t* to) {
    const __m512i low_half = _mm512_set1_epi8(0x0f), high_half = _mm512_set1_epi8(char(0xf0));
    for (int i = 0; i < 4; i++) {
        const __m512i line = _mm512_loadu_si512(block + i * kLine);
        const auto put = [&](int place, __m512i v) { _mm512_store_si512(to + (place + i) * kLine, v); };
        put(0, _mm512_and_si512(_mm512_slli_epi16(line, 4), high_half));
        put(4, _mm512_and_si512(line, high_half));
        put(8, _mm512_and_si512(line, low_half));
        put(12, _mm512_and_si512(_mm512_srli_epi16(line, 4), low_half));
    }
}

// Tiles are named by literals. A product takes some fifty cycles: it is begun kAhead blocks before it is looked at.
#define BEGIN(SUMS, CODES, WEIGHTS)       \
    _tile_loadd(WEIGHTS, weights, kLine); \
    _tile_loadd(CODES, codes, kLine);     \
    _tile_zero(SUMS);                     \
    _tile_dpbsud(SUMS, CODES, WEIGHTS);
#define BEGIN_BOTH(SUMS, LOW_SUMS, CODES, WEIGHTS)  \
    BEGIN(SUMS, CODES, WEIGHTS)                     \
    _tile_loadd(CODES, codes + kGroup, kLine);      \
    _tile_zero(LOW_SUMS);                           \
    _tile_dpbsud(LOW_SUMS, CODES, WEIGHTS);

template <int Bits>
constexpr int64_t kAhead = Bits == 4 ? 3 : 2;

// Begins the products of the i-th block with up to 16 rows.
template <int Bits>
INLINE void begin(int64_t i, const uint8_t* weights, const int8_t* codes) {
    asm volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
    if constexpr (Bits == 4) {
        switch (i % 4) {
            case 0: BEGIN(0, 4, 6) break;
            case 1: BEGIN(1, 5, 7) break;
            case 2: BEGIN(2, 4, 6) break;
            default: BEGIN(3, 5, 7)
        }
    } else if (i % 2 == 0) {
        BEGIN_BOTH(0, 2, 4, 6)
    } else {
        BEGIN_BOTH(1, 3, 5, 7)
    }
}

template <int Bits>
INLINE void keep(Scratch& s, int64_t i) {
    const auto products = s.products[i % kPlaces];
    if constexpr (Bits == 4) {
        switch (i % 4) {
            case 0: _tile_stored(0, products, kPanel * 4); break;
            case 1: _tile_stored(1, products, kPanel * 4); break;
            case 2: _tile_stored(2, products, kPanel * 4); break;
            default: _tile_stored(3, products, kPanel * 4);
        }
    } else if (i % 2 == 0) {
        _tile_stored(0, products, kPanel * 4);
        _tile_stored(2, s.low_products[i % kPlaces], kPanel * 4);
    } else {
        _tile_stored(1, products, kPanel * 4);
        _tile_stored(3, s.low_products[i % kPlaces], kPanel * 4);
    }
}

template <int Bits, bool HasOffset>
struct TileBlock {
    static constexpr WeightFormat kFormat{Bits, kGroup, HasOffset};
    static constexpr int64_t kBytes = kFormat.block_bytes();

    // As in linear_quantised.h, for Rows ≥ the rows that there are: what is beyond them is not looked at.
    template <int Rows>
    static INLINE void add_products(const Scratch& s, int64_t i, const uint8_t* scales, const Factors& x,
                                    Vec (&sums)[Rows]) {
        const Vec scale = load_half_precision(scales), offset = HasOffset ? load_half_precision(scales + 32) : Vec{};
#pragma GCC unroll 16
        for (int r = 0; r < Rows; r++) {
            IntVec products;
            __builtin_memcpy(&products, s.products[i % kPlaces][r], sizeof products);
            if constexpr (Bits == 8) {
                IntVec low;
                __builtin_memcpy(&low, s.low_products[i % kPlaces][r], sizeof low);
                products = (products << 4) + low;
            }
            if constexpr (kFormat.zero() != 0) products -= x.zero_sums[r];
            sums[r] = fused(__builtin_convertvector(products, Vec), scale * x.scales[r], sums[r]);
            if constexpr (HasOffset) sums[r] = fused(offset, broadcast(x.scaled_sums[r]), sums[r]);
        }
    }

    // The given blocks of a panel against up to Rows rows. ahead: what will be needed next, or null.
    template <int Rows>
    static __attribute__((noinline)) void add(Scratch& s, const uint8_t* blocks, int64_t count, const uint8_t* ahead,
                                              const int8_t (*codes)[kTileRows][2 * kGroup], Factors x,
                                              float (*sums_at)[kPanel]) {
        const auto weights_of = [&](int64_t i) { return Bits == 4 ? s.weights[i] : blocks + i * kBytes; };
        Vec sums[Rows];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; r++) sums[r] = load(sums_at[r]);
        constexpr int64_t begun = kAhead<Bits>;
        for (int64_t i = 0; i < begun && i < count; i++) begin<Bits>(i, weights_of(i), codes[i][0]);
        keep<Bits>(s, 0);
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; i++) {
            if (i + begun < count) begin<Bits>(i + begun, weights_of(i + begun), codes[i + begun][0]);
            if (i + 1 < count) keep<Bits>(s, i + 1);
            if (ahead)
                for (int64_t line = 0; line < kBytes; line += kLine) __builtin_prefetch(ahead + i * kBytes + line);
            add_products<Rows>(s, i, blocks + (i + 1) * kBytes - (HasOffset ? 64 : 32), x, sums);
            x = x.after(kTileRows);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; r++) store(sums_at[r], sums[r]);
    }
};

// The codes of some rows, block by block of inputs, as tiles are loaded.
INLINE void lay_codes(const QuantisedLinearArgs& a, int64_t first, int64_t rows, int8_t (*to)[2 * kGroup]) {
    const int64_t groups = QuantisedRow::groups(a.inputs);
    for (int64_t r = 0; r < rows; r++) {
        const int8_t* codes = QuantisedRow::at(a.x, first + r, a.inputs).codes;
        for (int64_t group = 0; group < groups; group++)
            __builtin_memcpy(to[group * kTileRows + r], codes + group * 2 * kGroup, 2 * kGroup);
    }
}

template <int Bits, bool HasOffset>
void tiles_of_span(const QuantisedLinearArgs& a, const QuantisedSpan& span) {
    using Block = TileBlock<Bits, HasOffset>;
    const int64_t groups = Block::kFormat.groups(a.inputs);
    const int64_t count = span.last_row - span.first_row, tiles = (count + kTileRows - 1) / kTileRows;
    const int64_t last_rows = count - (tiles - 1) * kTileRows;
    Scratch& s = scratch();
    FactorMemory& memory = factor_memory();
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = span.first_row + tile * kTileRows, rows = tile + 1 < tiles ? kTileRows : last_rows;
        lay_factors<kGroup>(a, first, rows, kTileRows, memory.from(tile * kTileRows * groups));
        lay_codes(a, first, rows, s.codes + tile * kTileRows * groups);
    }
    const TileShapes shapes = shapes_of(tiles > 1 ? kTileRows : count, Bits);  // rows beyond the last cost less than other shapes
    _tile_loadconfig(&shapes);
    // Part of the inputs after the other, for a chunk of panels, so that the activations are read from the nearest cache.
    const int64_t sections = (groups * tiles + kSection - 1) / kSection;
    const int64_t panel_bytes = groups * Block::kBytes;
    for (int64_t first_panel = span.first_panel; first_panel < span.last_panel; first_panel += kChunk) {
        const int64_t panels = min_of(kChunk, span.last_panel - first_panel);
        for (int64_t section = 0; section < sections; section++) {
            const int64_t first = groups * section / sections, number = groups * (section + 1) / sections - first;
            for (int64_t panel = 0; panel < panels; panel++) {
                const uint8_t* blocks = static_cast<const uint8_t*>(a.panels) + (first_panel + panel) * panel_bytes +
                                        first * Block::kBytes;
                if constexpr (Bits == 4)
                    for (int64_t i = 0; i < number; i++) unpack(blocks + i * Block::kBytes, s.weights[i]);
                if (section == 0) __builtin_memset(s.sums[panel], 0, size_t(tiles * kTileRows) * sizeof s.sums[0][0]);
                for (int64_t tile = 0; tile < tiles; tile++) {
                    const int64_t at = (tile * groups + first) * kTileRows;
                    const bool few = tile + 1 == tiles && last_rows <= 8;
                    const auto add = few ? Block::template add<8> : Block::template add<16>;
                    add(s, blocks, number, tile ? nullptr : blocks + panel_bytes,
                        reinterpret_cast<const int8_t(*)[kTileRows][2 * kGroup]>(s.codes + at), memory.from(at),
                        s.sums[panel] + tile * kTileRows);
                }
            }
        }
        for (int64_t r = 0; r < count; r++)
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t output = (first_panel + panel) * kPanel, n = min_of(kPanel, a.outputs - output);
                Vec sum = load(s.sums[panel][r]);
                if (a.bias) sum = sum + load_n(a.bias + output, n);
                store_n(a.out + (span.first_row + r) * a.out_stride + output, sum, n);
            }
    }
    _tile_release();
}

}  // namespace

void linear_quantised_amx(const QuantisedLinearArgs& a, const QuantisedSpan& span) {
    const int64_t count = span.last_row - span.first_row, padded = round_up(count, kTileRows);
    const bool fits = padded <= kMostTileRows && padded * QuantisedRow::groups(a.inputs) <= kMostFactors;
    if (count <= kFewRows || a.group != kGroup || !fits)
        kAvx512Vnni.linear_quantised(a, span);
    else if (a.bits == 4)
        (a.has_offset ? tiles_of_span<4, true> : tiles_of_span<4, false>)(a, span);
    else
        (a.has_offset ? tiles_of_span<8, true> : tiles_of_span<8, false>)(a, span);
}

#else

void linear_quantised_amx(const QuantisedLinearArgs&, const QuantisedSpan&) {}

#endif
