// What the launcher of linear hands to the kernels.
#pragma once

#include <cstdint>

#include "quantised.h"

// The rows of x, cut into tiles of about the same size: tile i is rows [first(i), first(i + 1)), and lies in
// memory input by input, its rows side by side.
struct LinearTiles {
    const float* x;
    int64_t rows, count, stride;
    int64_t first(int64_t tile) const { return rows * tile / count; }
};

// One work item: every row of some tiles against some panels.
struct LinearSpan {
    int64_t first_tile, last_tile, first_panel, last_panel;
};

constexpr int64_t kMostWidths = 1 << 15;  // rows × groups of a span of linear_quantised

// The same for linear_quantised.
struct QuantisedSpan {
    int64_t first_row, last_row, first_panel, last_panel;
};
