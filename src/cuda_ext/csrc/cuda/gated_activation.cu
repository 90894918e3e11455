// activation(gate) · up, where a row is the gates followed by the ups. A thread does eight elements.
#include "launch.h"

namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float activate(float x, bool is_silu) {
    if (is_silu) return divide_roughly(x, 1.0f + exp_two(-x * kLog2E));
    return 0.5f * x * (1.0f + tanh_of(0.7978845608f * (x + 0.044715f * x * x * x)));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gated_activation_kernel(GatedActivationArgs a, bool aligned) {
    const int64_t row = blockIdx.y, i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
    if (i >= a.dim) return;
    const int count = int(a.dim - i < 8 ? a.dim - i : 8);
    const T* gate = static_cast<const T*>(a.gate_up) + row * a.row_stride + i;
    by_alignment(aligned, [&](auto is_aligned) {
        float g[8], u[8];
        load_eight(g, gate, count, is_aligned);
        load_eight(u, gate + a.dim, count, is_aligned);
        UNROLL for (int e = 0; e < 8; e++) g[e] = activate(g[e], a.kind == kSilu) * u[e];
        store_eight(static_cast<T*>(a.out) + row * a.dim + i, g, count, is_aligned);
    });
}

constexpr int64_t kMostRows = 65535;  // of a grid

template <typename T>
int start(GatedActivationArgs a) {
    const bool aligned = is_aligned<T>(a.gate_up, a.row_stride) && is_aligned<T>(a.out, a.dim);
    const auto columns = unsigned((a.dim + kThreads * 8 - 1) / (kThreads * 8));
    for (int64_t left = a.rows; left > 0; left -= kMostRows) {
        const dim3 grid(columns, unsigned(left < kMostRows ? left : kMostRows));
        const int status =
            launch("gated_activation", gated_activation_kernel<T>, grid, kThreads, 0, a.stream, a, aligned);
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
