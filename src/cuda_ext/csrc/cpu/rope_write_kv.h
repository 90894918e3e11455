// Rotary embedding of q in place, and of k on its way into the cache; v goes into the cache as it is.
#pragma once

#include "quantise.h"
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

// The scales, one for each kCacheGroup elements, lie behind the codes.
INLINE void store_code_row(const float* row, int64_t dim, int8_t* to) {
    for (int64_t begin = 0; begin < dim; begin += kCacheGroup) {
        const int64_t count = min_of(kCacheGroup, dim - begin);
        const float* group = row + begin;
        IntVec sizes = {};
        for_each_vec(count,
                     [&](int64_t i, int64_t n) { sizes = larger(sizes, size_bits(load_n(group + i, n))); });
        const CodeScale scale = code_scale(largest_of(sizes));
        for_each_vec(count, [&](int64_t i, int64_t n) {
            int8_t codes[kWidth];
            store_codes(codes, to_codes(load_n(group + i, n), scale));
            __builtin_memcpy(to + begin + i, codes, n);
        });
        __builtin_memcpy(to + dim + begin / kCacheGroup * int64_t(sizeof scale.scale), &scale.scale, sizeof scale.scale);
    }
}

constexpr int64_t kMostDim = 1024;

INLINE void write_heads(const float* k, const float* v, const float* cos_sin, const RopeWriteKvArgs& a, int8_t* k_to,
                        int8_t* v_to) {
    float row[kMostDim];
    rotate_head(k, row, cos_sin, a.rotary_dim / 2);
    copy_row(k + a.rotary_dim, row + a.rotary_dim, a.dim - a.rotary_dim);
    store_code_row(row, a.dim, k_to);
    store_code_row(v, a.dim, v_to);
}

template <typename Cache>
INLINE void write_heads(const float* k, const float* v, const float* cos_sin, const RopeWriteKvArgs& a, Cache* k_to,
                        Cache* v_to) {
    rotate_head(k, k_to, cos_sin, a.rotary_dim / 2);
    copy_row(k + a.rotary_dim, k_to + a.rotary_dim, a.dim - a.rotary_dim);
    copy_row(v, v_to, a.dim);
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
            const int64_t row = (block * a.kv_heads + head) * a.block_size + offset;
            const int64_t place = row * cache_row<Cache>(a.dim);
            write_heads(k + head * a.k_head_stride, v + head * a.v_head_stride, cos_sin, a,
                        static_cast<Cache*>(a.k_cache) + place, static_cast<Cache*>(a.v_cache) + place);
        }
    }
}

void rope_write_kv(const RopeWriteKvArgs& a, int64_t begin, int64_t end) {
    if (a.cache_dtype == kFloat32)
        rope_write_kv_tokens<float>(a, begin, end);
    else if (a.cache_dtype == kBFloat16)
        rope_write_kv_tokens<bf16>(a, begin, end);
    else
        rope_write_kv_tokens<int8_t>(a, begin, end);
}

}  // namespace
