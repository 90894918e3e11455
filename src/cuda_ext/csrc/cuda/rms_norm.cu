// RMSNorm of rows (Zhang and Sennrich 2019, arXiv 1910.07467), with and without the residual addition. A block a row,
// whose shape depends on dim alone: one order of summation.
#include "launch.h"

namespace {

constexpr int kMostThreads = 1024;

// A row in registers. A thread has eight elements, or four eights that lie blockDim.x eights apart.
template <int Eights, bool IsAligned>
struct Row {
    int dim;
    float x[Eights][8];

    __device__ __forceinline__ int place(int n) const { return (n * int(blockDim.x) + int(threadIdx.x)) * 8; }
    __device__ __forceinline__ int count(int n) const { return dim - place(n) < 8 ? dim - place(n) : 8; }

    template <typename X>
    __device__ __forceinline__ void load(float (&to)[8], int n, const X* from) const {
        UNROLL for (float& e : to) e = 0.0f;
        if (place(n) < dim) load_eight(to, from + place(n), count(n), IsAligned);
    }

    template <typename X>
    __device__ __forceinline__ void add(const X* more) {
        UNROLL for (int n = 0; n < Eights; n++) {
            float eight[8];
            load(eight, n, more);
            UNROLL for (int e = 0; e < 8; e++) x[n][e] += eight[e];
        }
    }

    template <typename X>
    __device__ __forceinline__ void store(int n, X* to) const {
        if (place(n) < dim) store_eight(to + place(n), x[n], count(n), IsAligned);
    }

    template <typename X>
    __device__ __forceinline__ void store_normed(X* to, const float* weight, double eps) {
        __shared__ float parts[kMostThreads / kWarpSize];
        float weights[8], squares = 0;
        if (Eights == 1) load(weights, 0, weight);  // before the others are waited for
        UNROLL for (int n = 0; n < Eights; n++)
            UNROLL for (int e = 0; e < 8; e++) squares += x[n][e] * x[n][e];
        const float scale = 1.0f / sqrtf(sum_of_block(squares, parts) / float(dim) + float(eps));
        UNROLL for (int n = 0; n < Eights; n++) {
            if (Eights > 1) load(weights, n, weight);
            UNROLL for (int e = 0; e < 8; e++) x[n][e] = x[n][e] * scale * weights[e];
            store(n, to);
        }
    }
};

template <typename X, typename T, int Eights>
__global__ void __launch_bounds__(kMostThreads) rms_norm_kernel(RmsNormArgs a, bool aligned) {
    begin_kernel();
    const unsigned outer = blockIdx.x / unsigned(a.inner), inner = blockIdx.x % unsigned(a.inner);
    const X* x = static_cast<const X*>(a.x) + outer * a.outer_stride + inner * a.inner_stride;
    by_alignment(aligned, [&](auto is_aligned) {
        Row<Eights, is_aligned> it = {int(a.dim)};
        UNROLL for (int n = 0; n < Eights; n++) it.load(it.x[n], n, x);
        it.store_normed(static_cast<T*>(a.out) + int64_t(blockIdx.x) * a.dim, a.weight, a.eps);
    });
}

template <typename T, int Eights>
__global__ void __launch_bounds__(kMostThreads) add_rms_norm_kernel(AddRmsNormArgs a, bool aligned) {
    begin_kernel();
    const int64_t row = blockIdx.x;
    float* residual = a.residual + row * a.residual_stride;
    by_alignment(aligned, [&](auto is_aligned) {
        Row<Eights, is_aligned> it = {int(a.dim)};
        UNROLL for (int n = 0; n < Eights; n++) it.load(it.x[n], n, residual);
        it.add(static_cast<const T*>(a.x) + row * a.x_stride);
        UNROLL for (int n = 0; n < Eights; n++) it.store(n, residual);
        it.store_normed(static_cast<T*>(a.out) + row * a.dim, a.weight, a.eps);
    });
}

int threads_of(int64_t dim) {
    const int64_t warps = (dim + 8 * kWarpSize - 1) / (8 * kWarpSize);
    return int(warps < kMostThreads / kWarpSize ? warps : kMostThreads / kWarpSize) * kWarpSize;
}

template <typename Args, typename Kernel>
int start(const char* name, Kernel one_each, Kernel four_each, int64_t rows, const Args& a, bool aligned) {
    if (a.dim > 32 * kMostThreads) return kNotSupported;
    const auto kernel = a.dim <= 8 * kMostThreads ? one_each : four_each;
    return launch(name, kernel, dim3(unsigned(rows)), threads_of(a.dim), 0, a.stream, a,
                  aligned && is_aligned<float>(a.weight, a.dim));
}

template <typename X, typename T>
int start(const RmsNormArgs& a) {
    const bool aligned = is_aligned<X>(a.x, a.outer_stride) && is_aligned<X>(a.x, a.inner_stride) &&
                         is_aligned<T>(a.out, a.dim);
    return start("rms_norm", rms_norm_kernel<X, T, 1>, rms_norm_kernel<X, T, 4>, a.outer * a.inner, a, aligned);
}

template <typename T>
int start(const AddRmsNormArgs& a) {
    const bool aligned = is_aligned<T>(a.x, a.x_stride) && is_aligned<float>(a.residual, a.residual_stride) &&
                         is_aligned<T>(a.out, a.dim);
    return start("add_rms_norm", add_rms_norm_kernel<T, 1>, add_rms_norm_kernel<T, 4>, a.rows, a, aligned);
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
