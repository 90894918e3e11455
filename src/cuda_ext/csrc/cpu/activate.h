// The activations of gated feed-forward layers.
#pragma once

#include "vec.h"

namespace {

INLINE Vec silu(Vec x) { return x / (1.0f + exp_vec(-x)); }

INLINE Vec gelu_tanh(Vec x) {
    const Vec inner = 0.7978845608f * fma(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanh_vec(inner));
}

}  // namespace
