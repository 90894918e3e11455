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

// Where the weights that an outlier meets lie in a panel, in bytes: its code in the lowest bits of each output's word once
// that is shifted, and the scales of its block.
struct OutlierPlace {
    int32_t word, scales;
    float value;
    int16_t shift, row;  // row: of the tile
};

constexpr int64_t kMostRowsAnItem = 64;  // of linear_quantised, whose codes stay in the second-level cache

// The same for linear_quantised. places: room for one for each group of each row.
struct QuantisedSpan {
    int64_t first_row, last_row, first_panel, last_panel;
    OutlierPlace* places;
};
