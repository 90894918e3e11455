// Rows of the embedding matrix, gathered from its panels (linear.h) and scaled; ids that this rank does not hold
// give zeros.
#pragma once

#include "linear.h"
#include "linear_quantised.h"
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

// A half-precision number in a vector register and out again: each level has the instruction for it, or not.
INLINE float half_precision(const uint8_t* p) {
    uint8_t several[kWidth * 2] = {p[0], p[1]};
    return load_half_precision(several)[0];
}

template <bool ForTiles>
void embed_quantised(const EmbedArgs& a, int64_t begin, int64_t end) {
    const WeightFormat format{a.bits, a.group, a.has_offset != 0};
    const int64_t groups = format.groups(a.dim), lines = format.lines();
    for (int64_t token = begin; token < end; token++) {
        float* out = a.out + token * a.dim;
        const int64_t row = a.ids[token] - a.first_id, lane = row % kPanel;
        if (row < 0 || row >= a.rows) {
            __builtin_memset(out, 0, a.dim * sizeof(float));
            continue;
        }
        const auto* block = static_cast<const uint8_t*>(a.panels) + row / kPanel * groups * format.block_bytes();
        for (int64_t group = 0; group < groups; group++, block += format.block_bytes()) {
            const uint8_t* scales = block + lines * kLine + lane * 2;
            const float scale = half_precision(scales), offset = format.has_offset ? half_precision(scales + 32) : 0.0f;
            const int64_t first = group * a.group, count = min_of(a.group, a.dim - first);
            for (int64_t i = 0; i < count; i++) {
                const auto [byte, upper] = format.place(lane, i, ForTiles);
                const int code = block[byte];
                const int value = (a.bits == 8 ? code : upper ? code >> 4 : code & 15) - format.zero();
                out[first + i] = (float(value) * scale + offset) * float(a.scale);
            }
        }
    }
}

template <bool ForTiles>
void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
    if (a.bits) return embed_quantised<ForTiles>(a, begin, end);
    (a.dtype == kFloat32 ? embed_tokens<float> : embed_tokens<bf16>)(a, begin, end);
}

}  // namespace
