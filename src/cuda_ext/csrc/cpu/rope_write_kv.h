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

// Numbers of 16 bits, every second one from ``to`` on; count: a multiple of 32.
INLINE void store_apart(bf16* to, const bf16* from, int64_t count) {
#if defined(__AVX512BW__)
    for (int64_t i = 0; i < count; i += kWidth) {
        const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
        _mm512_mask_storeu_epi16(to + 2 * i, 0x55555555, _mm512_cvtepu16_epi32(narrow));
    }
#else
    for (int64_t i = 0; i < count; i++) to[2 * i] = from[i];
#endif
}

// Of a slot and a KV head, among the positions of all blocks' heads.
INLINE int64_t row_of(const RopeWriteKvArgs& a, int64_t slot, int64_t head) {
    return (slot / a.block_size * a.kv_heads + head) * a.block_size + slot % a.block_size;
}

// A token's head on its way into the cache; row: of row_of.
struct HeadToWrite {
    const RopeWriteKvArgs& a;
    const float *k, *v, *cos_sin;
    int64_t row;

    template <typename Out>
    INLINE void rotate_key(Out* to) const {
        rotate_head(k, to, cos_sin, a.rotary_dim / 2);
        copy_row(k + a.rotary_dim, to + a.rotary_dim, a.dim - a.rotary_dim);
    }
};

template <typename Cache>
struct HeadsOf {
    static INLINE void write(const HeadToWrite& head) {
        const int64_t place = head.row * cache_row<Cache>(head.a.dim);
        head.rotate_key(static_cast<Cache*>(head.a.k_cache) + place);
        copy_row(head.v, static_cast<Cache*>(head.a.v_cache) + place, head.a.dim);
    }
    static INLINE void expect(const RopeWriteKvArgs&, int64_t, int64_t) {}
};

template <>
INLINE void HeadsOf<int8_t>::write(const HeadToWrite& head) {
    const int64_t dim = head.a.dim, place = head.row * cache_row<int8_t>(dim);
    float row[kMostDim];
    head.rotate_key(row);
    store_code_row(row, dim, static_cast<int8_t*>(head.a.k_cache) + place);
    store_code_row(head.v, dim, static_cast<int8_t*>(head.a.v_cache) + place);
}

template <>
struct HeadsOf<Paired> {
    static INLINE void write(const HeadToWrite& head) {
        const int64_t dim = head.a.dim, at = head.row % kPairedPositions, group = (head.row - at) * dim;
        bf16* keys = static_cast<bf16*>(head.a.k_cache) + group;
        bf16* values = static_cast<bf16*>(head.a.v_cache) + group;
        bf16 row[kMostDim];
        head.rotate_key(row);
        for (int64_t d = 0; d < dim; d += 2)
            __builtin_memcpy(keys + d * kPairedPositions + 2 * at, row + d, 2 * sizeof(bf16));
        copy_row(head.v, row, dim);
        store_apart(values + at / 2 * 2 * dim + at % 2, row, dim);
    }

    // A key's pairs lie on lines of their own, for which single stores would wait one after the other.
    static INLINE void expect(const RopeWriteKvArgs& a, int64_t slot, int64_t slot_before) {
        if (slot / kPairedPositions == slot_before / kPairedPositions) return;
        for (int64_t head = 0; head < a.kv_heads; head++) {
            const int64_t row = row_of(a, slot, head), at = row % kPairedPositions, group = (row - at) * a.dim;
            const bf16* keys = static_cast<const bf16*>(a.k_cache) + group;
            const bf16* values = static_cast<const bf16*>(a.v_cache) + group + at / 2 * 2 * a.dim;
            for (int64_t d = 0; d < a.dim; d += 2) __builtin_prefetch(keys + d * kPairedPositions, 1);
            for (int64_t d = 0; d < a.dim; d += 16) __builtin_prefetch(values + 2 * d, 1);
        }
    }
};

template <typename Cache>
void rope_write_kv_tokens(const RopeWriteKvArgs& a, int64_t begin, int64_t end) {
    const int64_t half = a.rotary_dim / 2;
    for (int64_t token = begin; token < end; token++) {
        if (token + 1 < end) HeadsOf<Cache>::expect(a, a.cache_slots[token + 1], a.cache_slots[token]);
        const float* cos_sin = a.cos_sin + int64_t(a.positions[token]) * a.rotary_dim;
        float* q = a.q + token * a.q_token_stride;
        for (int64_t head = 0; head < a.heads; head++)
            rotate_head(q + head * a.q_head_stride, q + head * a.q_head_stride, cos_sin, half);
        const float* k = a.k + token * a.k_token_stride;
        const float* v = a.v + token * a.v_token_stride;
        for (int64_t head = 0; head < a.kv_heads; head++)
            HeadsOf<Cache>::write({a, k + head * a.k_head_stride, v + head * a.v_head_stride, cos_sin,
                                   row_of(a, a.cache_slots[token], head)});
    }
}

void rope_write_kv(const RopeWriteKvArgs& a, int64_t begin, int64_t end) {
    if (a.cache_dtype == kFloat32)
        rope_write_kv_tokens<float>(a, begin, end);
    else if (a.cache_dtype == kBFloat16)
        rope_write_kv_tokens<bf16>(a, begin, end);
    else if (a.cache_dtype == kBFloat16Pairs)
        rope_write_kv_tokens<Paired>(a, begin, end);
    else
        rope_write_kv_tokens<int8_t>(a, begin, end);
}

}  // namespace
