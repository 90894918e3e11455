// Rotary embedding (Su et al. 2021, arXiv 2104.09864; half rotation) of q in place, and of k on its way into the cache;
// v goes into the cache as it is. A block a token, its warps share out the heads.
#include "launch.h"

namespace {

constexpr int kThreads = 128;

template <typename T>
__device__ __forceinline__ void rotate(const T* from, const float* cos_sin, int half, int i, float& low, float& high) {
    const float cos = cos_sin[i], sin = cos_sin[half + i], x = to_float(from[i]), y = to_float(from[half + i]);
    low = x * cos - y * sin;
    high = y * cos + x * sin;
}

template <typename T, typename Cache>
__device__ void write_head(const T* k, const T* v, const float* cos_sin, const RopeWriteKvArgs& a, Cache* k_to,
                           Cache* v_to, float k_factor, float v_factor) {
    const int half = int(a.rotary_dim / 2), lane = int(threadIdx.x) % kWarpSize;
    for (int i = lane; i < half; i += kWarpSize) {
        float low, high;
        rotate(k, cos_sin, half, i, low, high);
        // As the activations' type keeps them: what is not cached is rounded alike.
        k_to[i] = from_float<Cache>(to_float(from_float<T>(low)) * k_factor);
        k_to[half + i] = from_float<Cache>(to_float(from_float<T>(high)) * k_factor);
    }
    for (int i = lane; i < a.dim; i += kWarpSize) {
        if (i >= 2 * half) k_to[i] = from_float<Cache>(to_float(k[i]) * k_factor);
        v_to[i] = from_float<Cache>(to_float(v[i]) * v_factor);
    }
}

template <typename T>
__device__ void rotate_in_place(T* q, const float* cos_sin, const RopeWriteKvArgs& a) {
    const int half = int(a.rotary_dim / 2);
    for (int i = int(threadIdx.x) % kWarpSize; i < half; i += kWarpSize) {
        float low, high;
        rotate(q, cos_sin, half, i, low, high);
        q[i] = from_float<T>(low);
        q[half + i] = from_float<T>(high);
    }
}

template <typename T, typename Cache>
__global__ void __launch_bounds__(kThreads, 1) rope_write_kv_kernel(RopeWriteKvArgs a) {
    const int64_t token = blockIdx.x, slot = a.cache_slots[token], position = a.positions[token];
    const bool has_position = position >= 0 && position < a.max_positions;
    const bool has_slot = slot >= 0 && slot < a.blocks * a.block_size;
    if (!has_position || !has_slot) {
        if (threadIdx.x == 0) atomicCAS(a.fault, kOk, has_position ? kSlotOutside : kPositionOutside);
        return;
    }
    const float* cos_sin = a.cos_sin + position * a.rotary_dim;
    const int64_t first = threadIdx.x / kWarpSize, step = kThreads / kWarpSize;
    for (int64_t head = first; head < a.heads; head += step)
        rotate_in_place(static_cast<T*>(a.q) + token * a.q_token_stride + head * a.q_head_stride, cos_sin, a);
    for (int64_t head = first; head < a.kv_heads; head += step) {
        const int64_t row = (slot / a.block_size * a.kv_heads + head) * a.block_size + slot % a.block_size;
        write_head(static_cast<const T*>(a.k) + token * a.k_token_stride + head * a.k_head_stride,
                   static_cast<const T*>(a.v) + token * a.v_token_stride + head * a.v_head_stride, cos_sin, a,
                   static_cast<Cache*>(a.k_cache) + row * a.dim, static_cast<Cache*>(a.v_cache) + row * a.dim,
                   1.0f / scale_of(a.k_scales, head), 1.0f / scale_of(a.v_scales, head));
    }
}

template <typename T>
int start(const RopeWriteKvArgs& a) {
    const auto run = [&a](auto kernel) {
        return launch("rope_write_kv", kernel, dim3(unsigned(a.tokens)), kThreads, 0, a.stream, a);
    };
    switch (a.cache_dtype) {
        case kBFloat16: return run(rope_write_kv_kernel<T, bf16>);
        case kFloat16: return run(rope_write_kv_kernel<T, fp16>);
        case kFloat8: return run(rope_write_kv_kernel<T, fp8>);
        default: return kNotSupported;
    }
}

}  // namespace

extern "C" EXPORT int shoal_rope_write_kv(const RopeWriteKvArgs* a) {
    return a->dtype == kBFloat16 ? start<bf16>(*a) : start<fp16>(*a);
}
