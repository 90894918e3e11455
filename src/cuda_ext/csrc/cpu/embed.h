// Rows of the embedding matrix, gathered from its panels (linear.h) and scaled; ids that this rank does not hold
// give zeros.
#pragma once

#include "linear.h"
#include "shoal_cpu.h"

namespace {

INLINE void gather(const float* word, int64_t dim, float scale, float* out) {
    for (int64_t i = 0; i < dim; i++) out[i] = word[i * kPanel] * scale;
}

INLINE float widen_one(uint32_t high_bits) {
    float x;
    __builtin_memcpy(&x, &high_bits, sizeof x);
    return x;
}

INLINE void gather(const bf16* word, int64_t dim, float scale, float* out) {
    for (int64_t i = 0; i < dim; i++) out[i] = widen_one(uint32_t(word[i / 2 * 2 * kPanel + i % 2]) << 16) * scale;
}

template <typename T>
void embed_tokens(const EmbedArgs& a, int64_t begin, int64_t end) {
    constexpr int64_t step = Words<T>::kStep;
    const int64_t panel_size = round_up(a.dim, step) * kPanel;
    for (int64_t token = begin; token < end; token++) {
        float* out = a.out + token * a.dim;
        const int64_t row = a.ids[token] - a.first_id;
        if (row < 0 || row >= a.rows) {
            __builtin_memset(out, 0, a.dim * sizeof(float));
            continue;
        }
        const T* panel = static_cast<const T*>(a.panels) + row / kPanel * panel_size;
        gather(panel + row % kPanel * step, a.dim, float(a.scale), out);
    }
}

void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
    (a.dtype == kFloat32 ? embed_tokens<float> : embed_tokens<bf16>)(a, begin, end);
}

}  // namespace
