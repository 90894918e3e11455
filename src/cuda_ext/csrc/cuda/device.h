// What kernels share: narrow floats, eight elements at a time, sums over a warp and a block, the exponential.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
using bf16 = __nv_bfloat16;
using fp16 = __half;
using fp8 = __nv_fp8_e4m3;

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(fp8 x) { return float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
    else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(x);
    else return T(x);
}

__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
#else
#include "emulation/emulation.h"
#include "emulation/types.h"

template <>
inline float from_float<float>(float x) {
    return x;
}
#endif

#if defined(__CUDACC__)
#define UNROLL _Pragma("unroll")
#define UNROLL_SOME _Pragma("unroll kAtOnce")
#define KEEP_LOOP _Pragma("unroll 1")
#else
#define UNROLL
#define UNROLL_SOME
#define KEEP_LOOP
#endif

__device__ __forceinline__ float to_float(float x) { return x; }

// What every kernel begins with. On sm_90 and later its blocks may be there before the kernel ahead of it has ended
// (launch.h): here they wait for its end and for what it wrote, and from here on those of the next kernel may come.
__device__ __forceinline__ void begin_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// (word & mask) | more, in one instruction also where both are constants.
__device__ __forceinline__ uint32_t take_bits(uint32_t word, uint32_t mask, uint32_t more) {
#if defined(__CUDACC__)
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(word), "r"(mask), "r"(more));
    return bits;
#else
    return (word & mask) | more;
#endif
}

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <typename T>
struct alignas(sizeof(T) * 8) Eight {
    T of[8];
};

// All of a Words at once, which must lie at a multiple of its size. By reference first: there UBSan looks at it.
template <typename Words>
__device__ __forceinline__ Words load_whole(const void* from) {
    const Words& there = *static_cast<const Words*>(from);
    return there;
}

template <typename Words>
__device__ __forceinline__ void store_whole(void* to, const Words& words) {
    Words& there = *static_cast<Words*>(to);
    there = words;
}

// Two elements as a register holds them, the first one low.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
    struct alignas(4) Pair {
        T low, high;
    } pair = {from_float<T>(low), from_float<T>(high)};
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// The low one of the two (which: 0), or the high one.
template <typename T>
__device__ __forceinline__ float element_of(uint32_t pair, int which) {
    const auto bits = uint16_t(pair >> 16 * which);
    T x;
    memcpy(&x, &bits, sizeof x);
    return to_float(x);
}

// The two fp8 in the low bytes, as a pair of half precision.
__device__ __forceinline__ uint32_t widened_pair(uint32_t codes) {
#if defined(__CUDACC__)
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(codes), __NV_E4M3);
    return uint32_t(pair.x) | uint32_t(pair.y) << 16;
#else
    return pair_of<fp16>(to_float(fp8{uint8_t(codes)}), to_float(fp8{uint8_t(codes >> 8)}));
#endif
}

__device__ __forceinline__ uint4 widened_eight(uint2 codes) {
    return {widened_pair(codes.x), widened_pair(codes.x >> 16), widened_pair(codes.y), widened_pair(codes.y >> 16)};
}

// Elements [0, count) of eight, zeros behind them. is_aligned: all eight are there, at a multiple of their size.
template <typename T>
__device__ __forceinline__ void load_eight(float (&to)[8], const T* from, int count, bool is_aligned) {
    if (is_aligned) {
        const auto all = load_whole<Eight<T>>(from);
        UNROLL for (int i = 0; i < 8; i++) to[i] = to_float(all.of[i]);
        return;
    }
    UNROLL for (int i = 0; i < 8; i++) to[i] = i < count ? to_float(from[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_eight(T* to, const float (&from)[8], int count, bool is_aligned) {
    if (is_aligned) {
        Eight<T> all;
        UNROLL for (int i = 0; i < 8; i++) all.of[i] = from_float<T>(from[i]);
        store_whole(to, all);
        return;
    }
    UNROLL for (int i = 0; i < 8; i++)
        if (i < count) to[i] = from_float<T>(from[i]);
}

// As store_eight of aligned elements of 16 bits, to global memory: as one vector, also where the compiler would take the
// struct apart.
template <typename T>
__device__ __forceinline__ void store_vector(T* to, const float (&from)[8]) {
#if defined(__CUDACC__)
    __stwb(reinterpret_cast<uint4*>(to), make_uint4(pair_of<T>(from[0], from[1]), pair_of<T>(from[2], from[3]),
                                                    pair_of<T>(from[4], from[5]), pair_of<T>(from[6], from[7])));
#else
    store_eight(to, from, 8, true);
#endif
}

template <typename T>
inline bool is_aligned(const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Eight<T>) == 0 && stride % 8 == 0;
}

template <bool Value>
struct Constant {
    __device__ constexpr operator bool() const { return Value; }
};

// Calls run with a constant of what is_aligned says: where it branched at each load, the next would wait for it.
template <typename Run>
__device__ __forceinline__ void by_alignment(bool is_aligned, const Run& run) {
    if (is_aligned) run(Constant<true>());
    else run(Constant<false>());
}

// What an fp8 cache of a KV head is multiplied with.
__device__ __forceinline__ float scale_of(const float* scales, int64_t head) { return scales ? scales[head] : 1.0f; }

// Adds one to what blocks share, which each does behind a barrier. What it was before.
__device__ __forceinline__ int count_in(int32_t* at) {
#if defined(__CUDACC__)
    int before;
    asm volatile("atom.release.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
#else
    return __atomic_fetch_add(at, 1, __ATOMIC_ACQ_REL);
#endif
}

// From here, and behind the next barrier, the block sees what those wrote that were counted before it.
__device__ __forceinline__ void see_counted() {
#if defined(__CUDACC__)
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// What is the same on all lanes, so that the compiler knows.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

// Of all lanes, in one order, on every lane.
__device__ __forceinline__ float sum_of_warp(float x) {
    UNROLL for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
    return x;
}

// Of all threads of a block, in one order, on every thread. parts: shared, a float for each warp.
__device__ __forceinline__ float sum_of_block(float x, float* parts) {
    const int warps = int(blockDim.x) / kWarpSize;
    x = sum_of_warp(x);
    if (warps == 1) return x;
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    float sum = parts[0];
    for (int warp = 1; warp < warps; warp++) sum += parts[warp];
    __syncthreads();
    return sum;
}

// 2^x
__device__ __forceinline__ float exp_two(float x) {
#if defined(__CUDACC__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}

// x / y but for a few last bits; 0 where y is beyond 2^126.
__device__ __forceinline__ float divide_roughly(float x, float y) {
#if defined(__CUDACC__)
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
    return x * inverse;
#else
    return y > 0x1p126f ? 0.0f : x / y;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;

// Whose division is a call, and so takes few registers.
__device__ __forceinline__ float tanh_of(float x) {
    const float e = exp_two(-2.0f * kLog2E * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

// But for a few last bits.
__device__ __forceinline__ float tanh_roughly(float x) {
    const float e = exp_two(-2.0f * kLog2E * fabsf(x));
    return copysignf(divide_roughly(1.0f - e, 1.0f + e), x);
}
