// Rows to columns, 32 bits an element (a float, or two bfloat16 that stay together).
#pragma once

#include "vec.h"

namespace {

// Rows of kWidth vectors become columns: log2(kWidth) rounds of interleaving halves.
INLINE void transpose(Vec (&v)[kWidth]) {
#if defined(__AVX512F__)
    const IntVec low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif defined(__AVX2__)
    const IntVec low = {0, 8, 1, 9, 2, 10, 3, 11};
#else
    const IntVec low = {0, 4, 1, 5};
#endif
    const IntVec high = low + kWidth / 2;
    for (int round = 1; round < kWidth; round *= 2) {
        Vec mixed[kWidth];
        for (int i = 0; i < kWidth / 2; i++) {
            mixed[2 * i] = __builtin_shuffle(v[i], v[i + kWidth / 2], low);
            mixed[2 * i + 1] = __builtin_shuffle(v[i], v[i + kWidth / 2], high);
        }
        for (int i = 0; i < kWidth; i++) v[i] = mixed[i];
    }
}

// from: [rows, length] → to: [length, pitch]; columns beyond ``rows`` get zeros. Whole vectors are written, so
// where kWidth does not divide ``pitch`` the end of ``to`` is overrun by less than a vector.
INLINE void interleave(const float* from, int64_t stride, int64_t rows, int64_t length, float* to, int64_t pitch) {
    for (int64_t at = 0; at < length; at += kWidth)
        for (int64_t row = 0; row < pitch; row += kWidth) {
            const int64_t n = min_of(kWidth, length - at);
            Vec v[kWidth];
            for (int i = 0; i < kWidth; i++)
                v[i] = row + i < rows ? load_n(from + (row + i) * stride + at, n) : Vec{};
            transpose(v);
            for (int64_t i = 0; i < n; i++) store(to + (at + i) * pitch + row, v[i]);
        }
}

}  // namespace
