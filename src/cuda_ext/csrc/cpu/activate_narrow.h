// The activations of gated feed-forward layers where their product is rounded to bfloat16 at once: within 2^-15 of
// themselves or 2^-126 of x, at less than half of what activate.h takes. For AVX-512; NaN in, NaN out.
#pragma once

#include "vec.h"

namespace {

// 1 / (1 + 2^n), from 2^-126 on. Whole powers of two come from the exponent, the rest from a polynomial with the least
// relative error, 2.6e-6, on [0, 1]; the estimate of 1 / sum has 14 bits, and one step of Newton's doubles them.
INLINE Vec inverse_of_one_plus_power(Vec n) {
    n = min_vec(broadcast(126.0f), n);
    const Vec rest = above_floor(n);
    Vec p = fma(broadcast(1.35341371e-2f), rest, broadcast(5.20114899e-2f));
    p = fma(p, rest, broadcast(2.41442755e-1f));
    p = fma(p, rest, broadcast(6.93003833e-1f));
    p = fma(p, rest, broadcast(1.00000262f));
    const Vec sum = 1.0f + (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
    const Vec estimate = (Vec)_mm512_rcp14_ps((__m512)sum);
    return fma(estimate, (Vec)_mm512_fnmadd_ps((__m512)sum, (__m512)estimate, (__m512)broadcast(1.0f)), estimate);
}

INLINE Vec narrow_silu(Vec x) { return x * inverse_of_one_plus_power(x * -kLog2E); }

// (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 · y)).
INLINE Vec narrow_gelu_tanh(Vec x) {
    return x * inverse_of_one_plus_power(-2.3022082f * fma(0.044715f * x * x, x, x));
}

}  // namespace
