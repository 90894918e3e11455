// The softmax of paged attention where its weights are rounded to bfloat16: powers of two of the scores, relative to a peak that
// rises only where a tile of positions exceeds it by more than kSlack, so that sums are seldom multiplied. For AVX-512.
#pragma once

#include "vec.h"

namespace {

constexpr float kSlack = 8.0f;  // weights are at most 2^kSlack

// 2^x + half; 0 below 2^-126. Without half within 8e-5: a cubic between powers of two (minimax). half: 2^-8 is half a unit of
// the last place of a bfloat16, so that cutting the rest off rounds.
INLINE Vec weight_of(Vec x, float half) {
    const Vec r = above_floor(x);
    Vec p = fma(r, broadcast(0.07802452f), broadcast(0.22606716f));
    p = fma(p, r, broadcast(0.69583354f));
    p = fma(p, r, broadcast(0.99992522f + half));
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(-126.0f), _CMP_NLT_UQ);
    return (Vec)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)x);
}

}  // namespace
