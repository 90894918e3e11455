// What linear's two sources share: that of plain weights, and that of fp8 ones.
#pragma once

#include "linear_tile.h"

inline LinearRows rows_of(const LinearArgs& a) {
    return {a.out,     a.x,          a.scales,     a.bias,      a.rows,            a.inputs,
            a.outputs, a.row_stride, a.out_stride, a.out_dtype, a.is_deterministic};
}

int start_linear_fp8(const LinearArgs& a);
