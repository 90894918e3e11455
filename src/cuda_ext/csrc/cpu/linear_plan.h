// What the launcher of linear hands to the kernels.
#pragma once

#include <cstdint>

#include "quantised.h"
#include "read_ahead.h"

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

// The rows of a tile in one column where some have an outlier: its value, or zero. Where its weights lie in a panel, in bytes:
// the code in the lowest bits of each output's word once that is shifted, and the scales of its block.
struct OutlierColumn {
    static constexpr int kRows = 8;
    int32_t word, scales, shift;
    float values[kRows];
};

// The same for linear_quantised. columns: where those of each tile of the rows begin, and where the last one's end. ahead: what to ask the memory for meanwhile.
struct QuantisedSpan {
    int64_t first_row, last_row, first_panel, last_panel;
    const OutlierColumn* const* columns;
    AskAhead* ahead;  // or null
};
