// Rotary embedding (Su et al. 2021, arXiv 2104.09864; half rotation) of q in place, and of k on its way into the cache;
// v goes into the cache as it is. A thread does eight pairs of one head, or eight elements that are only copied.
#include "launch.h"

namespace {

constexpr int kThreads = 128;

// How a token's eights are numbered: pairs of q's heads, then of k's, then what of k is not turned, then v.
struct Eights {
    int of_pairs, of_rest, of_head;  // in a head
    int end_of_q, end_of_k, end_of_rest, end_of_v;
    bool aligned;
};

int eights_of(int64_t elements) { return int((elements + 7) / 8); }

template <typename T>
struct Pairs {
    float low[8], high[8];

    __device__ __forceinline__ Pairs(const T* head, const float* cos_sin, int half, int i, int count, bool aligned) {
        float cos[8], sin[8], x[8], y[8];
        load_eight(x, head + i, count, aligned);
        load_eight(y, head + half + i, count, aligned);
        load_eight(cos, cos_sin + i, count, aligned);
        load_eight(sin, cos_sin + half + i, count, aligned);
        UNROLL for (int e = 0; e < 8; e++) {
            low[e] = x[e] * cos[e] - y[e] * sin[e];
            high[e] = y[e] * cos[e] + x[e] * sin[e];
        }
    }
};

// As the activations' type keeps them: what is not cached is rounded alike.
template <typename T, typename Cache>
__device__ __forceinline__ void cache_eight(Cache* to, const float (&from)[8], float factor, int count, bool aligned) {
    float scaled[8];
    UNROLL for (int e = 0; e < 8; e++) scaled[e] = to_float(from_float<T>(from[e])) * factor;
    store_eight(to, scaled, count, aligned);
}

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }

// The eight-th eight of a token.
template <bool IsAligned, typename T, typename Cache>
__device__ __forceinline__ void rope_eight(const RopeWriteKvArgs& a, const Eights& eights, int eight, int64_t token,
                                           uint32_t slot, const float* cos_sin) {
    const int half = int(a.rotary_dim / 2), dim = int(a.dim);
    if (eight < eights.end_of_q) {
        const int head = eight / eights.of_pairs, i = eight % eights.of_pairs * 8, count = least(half - i, 8);
        T* q = static_cast<T*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
        const Pairs<T> pairs(q, cos_sin, half, i, count, IsAligned);
        store_eight(q + i, pairs.low, count, IsAligned);
        store_eight(q + half + i, pairs.high, count, IsAligned);
        return;
    }
    const auto row_of = [&](int head) {
        const uint32_t block = slot / uint32_t(a.block_size), place = slot % uint32_t(a.block_size);
        return ((block * a.kv_heads + head) * a.block_size + place) * a.dim;
    };
    const auto k_of = [&](int head) {
        return static_cast<const T*>(a.k) + token * a.k_token_stride + head * a.k_head_stride;
    };
    if (eight < eights.end_of_k) {
        const int of_k = eight - eights.end_of_q, head = of_k / eights.of_pairs, i = of_k % eights.of_pairs * 8;
        const int count = least(half - i, 8);
        const Pairs<T> pairs(k_of(head), cos_sin, half, i, count, IsAligned);
        Cache* to = static_cast<Cache*>(a.k_cache) + row_of(head) + i;
        const float factor = 1.0f / scale_of(a.k_scales, head);
        cache_eight<T>(to, pairs.low, factor, count, IsAligned);
        cache_eight<T>(to + half, pairs.high, factor, count, IsAligned);
    } else if (eight < eights.end_of_v) {
        const bool is_v = eight >= eights.end_of_rest;
        const int in_part = eight - (is_v ? eights.end_of_rest : eights.end_of_k);
        const int of_head = is_v ? eights.of_head : eights.of_rest, head = in_part / of_head;
        const int i = in_part % of_head * 8 + (is_v ? 0 : 2 * half), count = least(dim - i, 8);
        const T* from =
            is_v ? static_cast<const T*>(a.v) + token * a.v_token_stride + head * a.v_head_stride : k_of(head);
        Cache* to = static_cast<Cache*>(is_v ? a.v_cache : a.k_cache) + row_of(head) + i;
        float values[8];
        load_eight(values, from + i, count, IsAligned);
        cache_eight<T>(to, values, 1.0f / scale_of(is_v ? a.v_scales : a.k_scales, head), count, IsAligned);
    }
}

// blockIdx.x: the token. Slots are below 2^31.
template <typename T, typename Cache>
__global__ void __launch_bounds__(kThreads) rope_write_kv_kernel(RopeWriteKvArgs a, Eights eights) {
    begin_kernel();
    const int64_t token = blockIdx.x, slot = a.cache_slots[token];
    const int position = a.positions[token], eight = int(blockIdx.y * kThreads + threadIdx.x);
    const bool has_position = position >= 0 && position < a.max_positions;
    const bool has_slot = slot >= 0 && slot < a.blocks * a.block_size;
    if (!has_position || !has_slot) {
        if (eight == 0) atomicCAS(a.fault, kOk, has_position ? kSlotOutside : kPositionOutside);
        return;
    }
    const float* cos_sin = a.cos_sin + position * a.rotary_dim;
    by_alignment(eights.aligned, [&](auto is_aligned) {
        rope_eight<is_aligned, T, Cache>(a, eights, eight, token, uint32_t(slot), cos_sin);
    });
}

template <typename T, typename Cache>
bool are_aligned(const RopeWriteKvArgs& a) {
    const int64_t strides = a.q_token_stride | a.q_head_stride | a.k_token_stride | a.k_head_stride | a.v_token_stride |
                            a.v_head_stride;
    return is_aligned<T>(a.q, strides) && is_aligned<T>(a.k, strides) && is_aligned<T>(a.v, strides) &&
           is_aligned<float>(a.cos_sin, a.rotary_dim / 2) && is_aligned<Cache>(a.k_cache, a.dim) &&
           is_aligned<Cache>(a.v_cache, a.dim);
}

template <typename T, typename Cache>
int start(const RopeWriteKvArgs& a) {
    Eights eights = {};
    eights.of_pairs = eights_of(a.rotary_dim / 2);
    eights.of_rest = eights_of(a.dim - a.rotary_dim);
    eights.of_head = eights_of(a.dim);
    eights.end_of_q = int(a.heads) * eights.of_pairs;
    eights.end_of_k = eights.end_of_q + int(a.kv_heads) * eights.of_pairs;
    eights.end_of_rest = eights.end_of_k + int(a.kv_heads) * eights.of_rest;
    eights.end_of_v = eights.end_of_rest + int(a.kv_heads) * eights.of_head;
    eights.aligned = are_aligned<T, Cache>(a);
    const dim3 grid(unsigned(a.tokens), unsigned((eights.end_of_v + kThreads - 1) / kThreads));
    return launch("rope_write_kv", rope_write_kv_kernel<T, Cache>, grid, kThreads, 0, a.stream, a, eights);
}

template <typename T>
int start(const RopeWriteKvArgs& a) {
    if (a.blocks * a.block_size > INT32_MAX) return kNotSupported;
    switch (a.cache_dtype) {
        case kBFloat16: return start<T, bf16>(a);
        case kFloat16: return start<T, fp16>(a);
        case kFloat8: return start<T, fp8>(a);
        default: return kNotSupported;
    }
}

}  // namespace

extern "C" EXPORT int shoal_rope_write_kv(const RopeWriteKvArgs* a) {
    return a->dtype == kBFloat16 ? start<bf16>(*a) : start<fp16>(*a);
}
