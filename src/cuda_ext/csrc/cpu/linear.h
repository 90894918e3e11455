// x · weightᵀ + bias, in float32, where the weight lies in panels of 16 outputs (pack_weight makes them).
//
// Every result is one chain of fused multiply-adds over the inputs in their order, started at zero, and the bias
// is added last. So it does not depend on the other rows, on the number of threads or on the level; only how
// many chains run side by side does.
#pragma once

#include "linear_plan.h"
#include "shoal_cpu.h"
#include "transpose.h"
#include "vec.h"

namespace {

constexpr int kVecs = int(kPanel) / kWidth;  // of a panel
constexpr int kMostRows = kWidth == 16 ? 8 : kWidth == 8 ? 6 : 4;
constexpr int kChains = kWidth == 16 ? 24 : 12;  // vectors of sums that leave registers for weights and x
constexpr int64_t kInputsAtOnce = 512;           // of several tiles: x and weights that stay in the caches

constexpr int64_t kRowsToFetchAhead = 4;         // with fewer the processor fetches as fast by itself
constexpr int64_t kPanelsAtOnce = 8;             // they meet a tile before the next tile comes

constexpr int panels_at_once(int rows) {
    int panels = kPanelsAtOnce;
    while (panels > 1 && panels * rows * kVecs > kChains) panels /= 2;
    return panels;
}

// --- weights: kStep inputs of a panel lie together, one word an output ---

template <typename Weight>
struct Words;

template <>
struct Words<float> {
    static constexpr int kStep = 1;
    static INLINE Vec input(Vec word, int) { return word; }
};

template <>
struct Words<bf16> {
    static constexpr int kStep = 2;
    static INLINE Vec input(Vec word, int i) {
        return i == 0 ? (Vec)((BitVec)word << 16) : (Vec)((BitVec)word & 0xffff0000);
    }
};

template <int Rows, int Panels>
struct Sums {
    Vec of[Rows][Panels][kVecs];
};

// Adds the products of one word of each panel's outputs: Inputs ≤ kStep inputs.
template <int Rows, int Panels, typename Weight, int Inputs>
INLINE void add_word(const float* x, const float* words, int64_t panel_stride, Sums<Rows, Panels>& sums) {
#pragma GCC unroll 8
    for (int p = 0; p < Panels; p++)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; v++) {
            const Vec word = load(words + p * panel_stride + v * kWidth);
#pragma GCC unroll 2
            for (int i = 0; i < Inputs; i++) {
                const Vec weight = Words<Weight>::input(word, i);
#pragma GCC unroll 12
                for (int r = 0; r < Rows; r++)
                    sums.of[r][p][v] = fused(broadcast(x[i * Rows + r]), weight, sums.of[r][p][v]);
            }
        }
}

// Words [from, to) of the panels that come after these are asked of the memory meanwhile.
struct NextPanels {
    int64_t distance, from, to;
};

template <int Rows, int Panels, typename Weight>
INLINE void add_products(const float* x, const float* words, int64_t panel_stride, int64_t inputs,
                         const NextPanels& ahead, Sums<Rows, Panels>& sums) {
    constexpr int step = Words<Weight>::kStep;
    const int64_t whole = inputs / step;
    for (int64_t k = 0; k < whole; k++) {
        if (k >= ahead.from && k < ahead.to)
#pragma GCC unroll 8
            for (int p = 0; p < Panels; p++) __builtin_prefetch(words + ahead.distance + p * panel_stride);
        add_word<Rows, Panels, Weight, step>(x, words, panel_stride, sums);
        x += step * Rows;
        words += kPanel;
    }
    if (inputs % step) add_word<Rows, Panels, Weight, 1>(x, words, panel_stride, sums);
}

// --- sums between the blocks of inputs: they wait in the result ---

template <int Rows, int Panels, typename Use>
INLINE void each_sum(const LinearArgs& a, int64_t row, int64_t panel, Sums<Rows, Panels>& sums, Use use) {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
        for (int p = 0; p < Panels; p++)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; v++) {
                const int64_t output = (panel + p) * kPanel + v * kWidth;
                const int64_t n = min_of(kWidth, a.outputs - output);
                if (n > 0) use(sums.of[r][p][v], output, a.out + (row + r) * a.out_stride + output, n);
            }
}

// Inputs [from, to) of consecutive panels.
template <typename Weight>
struct Block {
    const float* words;  // the first panel's
    int64_t panel_stride, from, to;
    NextPanels ahead;
};

// x: the tile's, at input ``from``.
template <int Rows, int Panels, typename Weight>
INLINE void tile_block(const LinearArgs& a, const float* x, int64_t row, int64_t panel, const Block<Weight>& block) {
    const auto [words, panel_stride, from, to, ahead] = block;
    Sums<Rows, Panels> sums = {};
    if (from > 0)
        each_sum(a, row, panel, sums, [](Vec& sum, int64_t, float* out, int64_t n) { sum = load_n(out, n); });
    add_products<Rows, Panels, Weight>(x, words, panel_stride, to - from, ahead, sums);
    const float* bias = to == a.inputs ? a.bias : nullptr;
    each_sum(a, row, panel, sums, [bias](Vec& sum, int64_t output, float* out, int64_t n) {
        store_n(out, bias ? sum + load_n(bias + output, n) : sum, n);
    });
}

// A tile against panels [first, last), as many at a time as registers allow, then half as many, and so on.
template <int Rows, int Panels, typename Weight>
INLINE void tile_panels(const LinearArgs& a, const float* x, int64_t row, int64_t first, int64_t last,
                        Block<Weight> block) {
    for (; first + Panels <= last; first += Panels) {
        tile_block<Rows, Panels, Weight>(a, x, row, first, block);
        block.words += Panels * block.panel_stride;
    }
    if constexpr (Panels > 1)
        if (first < last) tile_panels<Rows, Panels / 2, Weight>(a, x, row, first, last, block);
}

// The number of rows becomes a constant.
template <int Rows, typename Weight>
void tile_of(int64_t rows, const LinearArgs& a, const float* x, int64_t row, int64_t first, int64_t last,
             const Block<Weight>& block) {
    if constexpr (Rows > 1)
        if (rows < Rows) return tile_of<Rows - 1, Weight>(rows, a, x, row, first, last, block);
    tile_panels<Rows, panels_at_once(Rows), Weight>(a, x + block.from * Rows, row, first, last, block);
}

template <typename Weight>
void linear_span(const LinearArgs& a, const LinearTiles& tiles, const LinearSpan& span) {
    constexpr int step = Words<Weight>::kStep;
    const int64_t panel_stride = (a.inputs + step - 1) / step * kPanel;
    const int64_t inputs = span.last_tile - span.first_tile == 1 ? a.inputs : kInputsAtOnce;
    for (int64_t from = 0; from < a.inputs; from += inputs)
        for (int64_t panel = span.first_panel; panel < span.last_panel; panel += kPanelsAtOnce) {
            const float* words = static_cast<const float*>(a.panels) + panel * panel_stride + from / step * kPanel;
            const int64_t to = min_of(from + inputs, a.inputs), last = min_of(panel + kPanelsAtOnce, span.last_panel);
            const int64_t tile_count = span.last_tile - span.first_tile;
            const bool is_worth_it = tile_count > 1 || a.rows >= kRowsToFetchAhead;
            const int64_t share = is_worth_it ? (to - from) / step / tile_count + 1 : 0;
            for (int64_t tile = span.first_tile; tile < span.last_tile; tile++) {
                const int64_t part = (tile - span.first_tile) * share;
                const NextPanels ahead{kPanelsAtOnce * panel_stride, part, part + share};
                const Block<Weight> block{words, panel_stride, from, to, ahead};
                const int64_t row = tiles.first(tile), rows = tiles.first(tile + 1) - row;
                tile_of<kMostRows, Weight>(rows, a, tiles.x + tile * tiles.stride, row, panel, last, block);
            }
        }
}

void linear(const LinearArgs& a, const LinearTiles& tiles, const LinearSpan& span) {
    (a.dtype == kFloat32 ? linear_span<float> : linear_span<bf16>)(a, tiles, span);
}

void lay_tiles(const LinearArgs& a, const LinearTiles& tiles, float* to, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t row = tiles.first(tile), rows = tiles.first(tile + 1) - row;
        interleave(a.x + row * a.row_stride, a.row_stride, rows, a.inputs, to + tile * tiles.stride, rows);
    }
}

void pack_weight(const PackWeightArgs& a, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++)
        interleave(a.weight + panel * kPanel * a.row_stride, a.row_stride, min_of(kPanel, a.rows - panel * kPanel),
                   a.words, a.panels + panel * kPanel * a.words, kPanel);
}

}  // namespace
