// RMSNorm of rows (Zhang and Sennrich 2019, arXiv 1910.07467), with and without the residual addition. A block a row,
// whose shape depends on dim alone: one order of summation.
#include "launch.h"

namespace {

constexpr int kMostThreads = 256;
constexpr int64_t kWarpDim = 512;  // that a warp does as fast as a block

int threads_of(int64_t dim) { return dim <= kWarpDim ? kWarpSize : kMostThreads; }

__device__ __forceinline__ float scale_of(float squares, int64_t dim, double eps, float* parts) {
    return 1.0f / sqrtf(sum_of_block(squares, parts) / float(dim) + float(eps));
}

template <typename T>
__device__ __forceinline__ void write_normed(T* out, const float (&x)[8], float scale, const float* weight, int count,
                                             bool aligned) {
    float y[8];
    UNROLL for (int i = 0; i < 8; i++) y[i] = i < count ? x[i] * scale * weight[i] : 0.0f;
    store_eight(out, y, count, aligned);
}

template <typename X, typename T>
__global__ void __launch_bounds__(kMostThreads) rms_norm_kernel(RmsNormArgs a, bool aligned) {
    __shared__ float parts[kMostThreads / kWarpSize];
    const int64_t row = blockIdx.x;
    const X* x = static_cast<const X*>(a.x) + row / a.inner * a.outer_stride + row % a.inner * a.inner_stride;
    T* out = static_cast<T*>(a.out) + row * a.dim;
    float squares = 0, eight[8];
    for (int64_t i = int64_t(threadIdx.x) * 8; i < a.dim; i += int64_t(blockDim.x) * 8) {
        load_eight(eight, x + i, int(a.dim - i), aligned);
        UNROLL for (float e : eight) squares += e * e;
    }
    const float scale = scale_of(squares, a.dim, a.eps, parts);
    for (int64_t i = int64_t(threadIdx.x) * 8; i < a.dim; i += int64_t(blockDim.x) * 8) {
        const int count = int(a.dim - i < 8 ? a.dim - i : 8);
        load_eight(eight, x + i, count, aligned);
        write_normed(out + i, eight, scale, a.weight + i, count, aligned);
    }
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads) add_rms_norm_kernel(AddRmsNormArgs a, bool aligned) {
    __shared__ float parts[kMostThreads / kWarpSize];
    const int64_t row = blockIdx.x;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    float* residual = a.residual + row * a.residual_stride;
    T* out = static_cast<T*>(a.out) + row * a.dim;
    float squares = 0, sum[8], more[8];
    for (int64_t i = int64_t(threadIdx.x) * 8; i < a.dim; i += int64_t(blockDim.x) * 8) {
        const int count = int(a.dim - i < 8 ? a.dim - i : 8);
        load_eight(sum, residual + i, count, aligned);
        load_eight(more, x + i, count, aligned);
        UNROLL for (int e = 0; e < 8; e++) {
            sum[e] += more[e];
            squares += sum[e] * sum[e];
        }
        store_eight(residual + i, sum, count, aligned);
    }
    const float scale = scale_of(squares, a.dim, a.eps, parts);
    for (int64_t i = int64_t(threadIdx.x) * 8; i < a.dim; i += int64_t(blockDim.x) * 8) {
        const int count = int(a.dim - i < 8 ? a.dim - i : 8);
        load_eight(sum, residual + i, count, aligned);  // this thread's own
        write_normed(out + i, sum, scale, a.weight + i, count, aligned);
    }
}

template <typename X, typename T>
int start(const RmsNormArgs& a) {
    const bool aligned = is_aligned<X>(a.x, a.outer_stride) && is_aligned<X>(a.x, a.inner_stride) &&
                         is_aligned<T>(a.out, a.dim);
    return launch("rms_norm", rms_norm_kernel<X, T>, dim3(unsigned(a.outer * a.inner)), threads_of(a.dim), 0, a.stream,
                  a, aligned);
}

template <typename T>
int start(const AddRmsNormArgs& a) {
    const bool aligned = is_aligned<T>(a.x, a.x_stride) && is_aligned<float>(a.residual, a.residual_stride) &&
                         is_aligned<T>(a.out, a.dim);
    return launch("add_rms_norm", add_rms_norm_kernel<T>, dim3(unsigned(a.rows)), threads_of(a.dim), 0, a.stream, a,
                  aligned);
}

}  // namespace

extern "C" EXPORT int shoal_rms_norm(const RmsNormArgs* a) {
    const bool is_bfloat16 = a->dtype == kBFloat16;
    if (a->x_dtype == kFloat32) return is_bfloat16 ? start<float, bf16>(*a) : start<float, fp16>(*a);
    if (a->x_dtype != a->dtype) return kNotSupported;
    return is_bfloat16 ? start<bf16, bf16>(*a) : start<fp16, fp16>(*a);
}

extern "C" EXPORT int shoal_add_rms_norm(const AddRmsNormArgs* a) {
    return a->dtype == kBFloat16 ? start<bf16>(*a) : start<fp16>(*a);
}
