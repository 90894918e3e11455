// Rotary embedding of q in place, and of k on its way into the cache; v goes into the cache as it is.
#pragma once

#include "shoal_cpu.h"
#include "vec.h"

namespace {

// Half rotation: element i turns with element i + half. ``from`` may be ``to``.
template <typename Out>
INLINE void rotate_head(const float* from, Out* to, const float* cos_sin, int64_t half) {
    for_each_vec(half, [&](int64_t i, int64_t n) {
        const Vec cos = load_n(cos_sin + i, n), sin = load_n(cos_sin + half + i, n);
        const Vec low = load_n(from + i, n), high = load_n(from + half + i, n);
        store_n(to + i, low * cos - high * sin, n);
        store_n(to + half + i, high * cos + low * sin, n);
    });
}

template <typename Out>
INLINE void copy_row(const float* from, Out* to, int64_t count) {
    for_each_vec(count, [&](int64_t i, int64_t n) { store_n(to + i, load_n(from + i, n), n); });
}

template <typename Cache>
void rope_write_kv_tokens(const RopeWriteKvArgs& a, int64_t begin, int64_t end) {
    const int64_t half = a.rotary_dim / 2;
    for (int64_t token = begin; token < end; token++) {
        const float* cos_sin = a.cos_sin + int64_t(a.positions[token]) * a.rotary_dim;
        float* q = a.q + token * a.q_token_stride;
        for (int64_t head = 0; head < a.heads; head++)
            rotate_head(q + head * a.q_head_stride, q + head * a.q_head_stride, cos_sin, half);

        const int64_t block = a.cache_slots[token] / a.block_size, offset = a.cache_slots[token] % a.block_size;
        const float* k = a.k + token * a.k_token_stride;
        const float* v = a.v + token * a.v_token_stride;
        for (int64_t head = 0; head < a.kv_heads; head++) {
            const int64_t place = ((block * a.kv_heads + head) * a.block_size + offset) * a.dim;
            Cache* k_to = static_cast<Cache*>(a.k_cache) + place;
            Cache* v_to = static_cast<Cache*>(a.v_cache) + place;
            const float* k_from = k + head * a.k_head_stride;
            rotate_head(k_from, k_to, cos_sin, half);
            copy_row(k_from + a.rotary_dim, k_to + a.rotary_dim, a.dim - a.rotary_dim);
            copy_row(v + head * a.v_head_stride, v_to, a.dim);
        }
    }
}

void rope_write_kv(const RopeWriteKvArgs& a, int64_t begin, int64_t end) {
    (a.cache_dtype == kFloat32 ? rope_write_kv_tokens<float> : rope_write_kv_tokens<bf16>)(a, begin, end);
}

}  // namespace
