// activation(gate) · up, where a row is the gates followed by the ups.
#pragma once

#include "activate.h"
#include "quantise.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

template <Vec (*Activate)(Vec)>
void gated_activation_rows(const GatedActivationArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float* gate = a.gate_up + row * a.row_stride;
        const float* up = gate + a.dim;
        write_row(a.out, a.quantised, row, a.dim,
                  [&](int64_t i, int64_t n) { return Activate(load_n(gate + i, n)) * load_n(up + i, n); },
                  kPlainSquaresGated);
    }
}

void gated_activation(const GatedActivationArgs& a, int64_t begin, int64_t end) {
    (a.kind == kSilu ? gated_activation_rows<silu> : gated_activation_rows<gelu_tanh>)(a, begin, end);
}

}  // namespace
