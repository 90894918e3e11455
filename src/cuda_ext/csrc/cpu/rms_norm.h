// RMSNorm of rows, with and without the residual addition. One order of summation: that of the row.
#pragma once

#include "quantise.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

// Sum of squares of two interleaved halves, so that two chains of additions run side by side.
struct SquareSum {
    Vec even = {}, odd = {};
    INLINE void add(Vec v, int64_t offset) {
        if ((offset / kWidth) % 2 == 0)
            even = fma(v, v, even);
        else
            odd = fma(v, v, odd);
    }
    INLINE float scale(int64_t dim, double eps) const {
        return float(1.0 / __builtin_sqrt(double(sum_of(even + odd)) / double(dim) + eps));
    }
};

void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float* x = a.x + row / a.inner * a.outer_stride + row % a.inner * a.inner_stride;
        SquareSum squares;
        for_each_vec(a.dim, [&](int64_t i, int64_t n) { squares.add(load_n(x + i, n), i); });
        const Vec scale = broadcast(squares.scale(a.dim, a.eps));
        write_row(a.out, a.quantised, row, a.dim,
                  [&](int64_t i, int64_t n) { return load_n(x + i, n) * scale * load_n(a.weight + i, n); });
    }
}

void add_rms_norm(const AddRmsNormArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float* x = a.x + row * a.x_stride;
        float* residual = a.residual + row * a.residual_stride;
        SquareSum squares;
        for_each_vec(a.dim, [&](int64_t i, int64_t n) {
            const Vec sum = load_n(residual + i, n) + load_n(x + i, n);
            store_n(residual + i, sum, n);
            squares.add(sum, i);
        });
        const Vec scale = broadcast(squares.scale(a.dim, a.eps));
        write_row(a.out, a.quantised, row, a.dim,
                  [&](int64_t i, int64_t n) { return load_n(residual + i, n) * scale * load_n(a.weight + i, n); });
    }
}

}  // namespace
