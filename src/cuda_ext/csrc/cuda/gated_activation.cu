// activation(gate) · up, where a row is the gates followed by the ups. A thread does eight elements.
#include "launch.h"

namespace {

constexpr int kThreads = 128;

template <bool IsSilu>
__device__ __forceinline__ float activate(float x) {
    if (IsSilu) return divide_roughly(x, 1.0f + exp_two(-x * kLog2E));
    return 0.5f * x * (1.0f + tanh_roughly(0.7978845608f * (x + 0.044715f * x * x * x)));
}

template <typename T, bool IsSilu, bool IsAligned>
__global__ void __launch_bounds__(kThreads) gated_activation_kernel(GatedActivationArgs a) {
    begin_kernel();
    const int64_t row = blockIdx.y, i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
    if (i >= a.dim) return;
    const int count = int(a.dim - i < 8 ? a.dim - i : 8);
    const T* gate = static_cast<const T*>(a.gate_up) + row * a.row_stride + i;
    float g[8], u[8];
    load_eight(g, gate, count, IsAligned);
    load_eight(u, gate + a.dim, count, IsAligned);
    UNROLL for (int e = 0; e < 8; e++) g[e] = activate<IsSilu>(g[e]) * u[e];
    T* out = static_cast<T*>(a.out) + row * a.dim + i;
    if (IsAligned) store_vector(out, g);
    else store_eight(out, g, count, false);
}

template <typename T, bool IsSilu>
auto kernel_for(bool is_aligned) {
    return is_aligned ? gated_activation_kernel<T, IsSilu, true> : gated_activation_kernel<T, IsSilu, false>;
}

constexpr int64_t kMostRows = 65535;  // of a grid

template <typename T>
int start(GatedActivationArgs a) {
    const bool aligned = is_aligned<T>(a.gate_up, a.row_stride) && is_aligned<T>(a.out, a.dim);
    const auto columns = unsigned((a.dim + kThreads * 8 - 1) / (kThreads * 8));
    const auto kernel = a.kind == kSilu ? kernel_for<T, true>(aligned) : kernel_for<T, false>(aligned);
    for (int64_t left = a.rows; left > 0; left -= kMostRows) {
        const dim3 grid(columns, unsigned(left < kMostRows ? left : kMostRows));
        const int status = launch("gated_activation", kernel, grid, kThreads, 0, a.stream, a);
        if (status) return status;
        a.gate_up = static_cast<const T*>(a.gate_up) + kMostRows * a.row_stride;
        a.out = static_cast<T*>(a.out) + kMostRows * a.dim;
    }
    return kOk;
}

}  // namespace

extern "C" EXPORT int shoal_gated_activation(const GatedActivationArgs* a) {
    return a->dtype == kBFloat16 ? start<bf16>(*a) : start<fp16>(*a);
}
