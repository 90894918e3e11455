// Rows of float32 against bfloat16 on the tiles of AMX. A row is the sum of two rows of bfloat16, the nearest one and the
// nearest one of what is left: 16 bits of its mantissa count. Each result is one chain: for each 32 inputs the products
// of the first part, then those of the second one, as TDPBF16PS adds them up in float32. It depends on no other row.
#pragma once

#include <type_traits>

#include "tiles.h"
#include "vec.h"

namespace {

constexpr int64_t kStripWords = kStrip * 16;        // what 16 outputs have for them: pairs of inputs, side by side
constexpr int64_t kPartWords = kStrip * kTileRows;  // one part of 16 rows
constexpr int64_t kPanelsAtOnce = 4;                // of 16 outputs

// Tiles: sums 0 to 3, the two parts of x 4 and 5, weights 6 and 7.
INLINE void load_shapes(int64_t rows) {
    TileShapes shapes;
    for (int tile = 0; tile < 6; tile++) shapes.set(tile, min_of(rows, kTileRows), kTileLine);
    for (int tile = 6; tile < 8; tile++) shapes.set(tile, kTileRows, kTileLine);
    _tile_loadconfig(&shapes);
}

// To bfloat16; a NaN stays one.
INLINE HalfVec nearest(Vec v) { return (HalfVec)_mm512_cvtneps_pbh((__m512)v); }

// Rows in parts, as tiles take them: for each 16 rows and each strip the first parts of all, then the second ones. Where a
// row's begin.
INLINE Narrow* parts_of(Narrow* parts, int64_t row, int64_t strips) {
    return parts + (row / kTileRows * strips * 2 * kTileRows + row % kTileRows) * kStrip;
}

// A row to its parts; zeros follow its inputs.
INLINE void split_row(const float* x, int64_t inputs, Narrow* to) {
    for (int64_t strip = 0; strip < strips_of(inputs); strip++, to += 2 * kPartWords)
        for (int64_t i = 0; i < kStrip; i += kWidth) {
            const int64_t n = min_of(kWidth, inputs - strip * kStrip - i);
            const Vec all = n > 0 ? load_n(x + strip * kStrip + i, n) : Vec{};
            const HalfVec first = nearest(all), second = nearest(all - (Vec)(widen_halves(first) << 16));
            __builtin_memcpy(to + i, &first, sizeof first);
            __builtin_memcpy(to + kPartWords + i, &second, sizeof second);
        }
}

// What is multiplied: ``strips`` strips of up to 16 rows, and of some panels that lie ``stride`` words apart.
struct Factors16 {
    const Narrow* x;
    const Narrow* weights;
    int64_t stride, strips;
};

// Where the sums lie: panels ``panel_stride`` floats apart, rows ``row_bytes``.
struct Sums16 {
    float* at;
    int64_t panel_stride, row_bytes;
};

constexpr int64_t kNoFetch = 0;

// Tiles are named by literals: DO(panel's sums, its weights).
#define EACH_PANEL(DO)                     \
    DO(0, 6)                               \
    if constexpr (Panels > 1) { DO(1, 7) } \
    if constexpr (Panels > 2) { DO(2, 6) } \
    if constexpr (Panels > 3) { DO(3, 7) }
#define ZERO(SUMS, WEIGHTS) _tile_zero(SUMS);
#define LOAD(SUMS, WEIGHTS) _tile_loadd(SUMS, sums.at + SUMS * sums.panel_stride, sums.row_bytes);
#define STORE(SUMS, WEIGHTS) _tile_stored(SUMS, sums.at + SUMS * sums.panel_stride, sums.row_bytes);
#define MULTIPLY(SUMS, WEIGHTS)                                  \
    _tile_loadd(WEIGHTS, weights + SUMS * of.stride, kTileLine); \
    _tile_dpbf16ps(SUMS, 4, WEIGHTS);                            \
    _tile_dpbf16ps(SUMS, 5, WEIGHTS);

// Adds products to the sums, or starts them. ahead: bytes from the weights in use to those that are asked of the memory.
template <int Panels>
INLINE void multiply_tiles(const Factors16& of, const Sums16& sums, bool starts, int64_t ahead = kNoFetch) {
    asm volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
    if (starts) {
        EACH_PANEL(ZERO)
    } else {
        EACH_PANEL(LOAD)
    }
    const Narrow *x = of.x, *weights = of.weights;
    for (int64_t strip = 0; strip < of.strips; strip++, x += 2 * kPartWords, weights += kStripWords) {
        if (ahead != kNoFetch)
            for (int panel = 0; panel < Panels; panel++)
                for (int64_t line = 0; line < kStripWords * 2; line += kTileLine)
                    __builtin_prefetch(reinterpret_cast<const char*>(weights + panel * of.stride) + ahead + line);
        _tile_loadd(4, x, kTileLine);
        _tile_loadd(5, x + kPartWords, kTileLine);
        EACH_PANEL(MULTIPLY)
    }
    EACH_PANEL(STORE)
    asm volatile("" ::: "memory");
}

// The number of panels, 1 to 4, becomes a constant.
template <typename Use>
INLINE void with_panels(int64_t panels, Use use) {
    switch (panels) {
        case 1: return use(std::integral_constant<int, 1>{});
        case 2: return use(std::integral_constant<int, 2>{});
        case 3: return use(std::integral_constant<int, 3>{});
        default: return use(std::integral_constant<int, 4>{});
    }
}

}  // namespace
