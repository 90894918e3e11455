// Rows of the embedding matrix, scaled; ids that this rank does not hold give zeros.
#pragma once

#include "shoal_cpu.h"
#include "vec.h"

namespace {

template <typename T>
void embed_tokens(const EmbedArgs& a, int64_t begin, int64_t end) {
    const Vec scale = broadcast(float(a.scale));
    for (int64_t token = begin; token < end; token++) {
        float* out = a.out + token * a.dim;
        const int64_t local = a.ids[token] - a.first_id;
        if (local < 0 || local >= a.rows) {
            __builtin_memset(out, 0, a.dim * sizeof(float));
            continue;
        }
        const T* row = static_cast<const T*>(a.weight) + local * a.row_stride;
        for_each_vec(a.dim, [&](int64_t i, int64_t n) { store_n(out + i, load_n(row + i, n) * scale, n); });
    }
}

void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
    (a.dtype == kFloat32 ? embed_tokens<float> : embed_tokens<bf16>)(a, begin, end);
}

}  // namespace
