// The product with a matrix of fp8 (e4m3), each row of it scaled. bfloat16 and half precision hold e4m3 exactly: it becomes
// them in registers, and the scale goes onto an output's whole sum. For many rows cuBLAS has them scaled, piece by piece.
#include "library_product.h"
#include "linear_matrix.h"

namespace {

// Bytes 0 and 1 of ``codes`` as a pair. With its exponent in the place of T's a number is too small by a power of two,
// subnormal ones too. Codes are finite.
template <typename T>
__device__ __forceinline__ uint32_t widen_codes(uint32_t codes) {
    constexpr bool kIsBfloat16 = std::is_same_v<T, bf16>;
    constexpr uint32_t kPower = kIsBfloat16 ? 0x7b807b80 : 0x5c005c00;  // 2^120, 2^8
    const uint32_t high = __byte_perm(codes, 0, 0x1404);  // bytes as high ones
    const uint32_t sizes = high >> (kIsBfloat16 ? 4 : 1) & (kIsBfloat16 ? 0x07f007f0 : 0x3f803f80);
    return of_pairs<T>((high & 0x80008000) | sizes, kPower, [](auto code, auto power) { return code * power; });
}

template <typename T>
struct Fp8Weight : MatrixWeight<T, uint8_t> {
    using typename MatrixWeight<T, uint8_t>::Tile;
    static constexpr int kAhead[2] = {2, 3}, kPanels = 1;

    __device__ __forceinline__ void widen(const Tile& tile, uint32_t (&a)[kSteps][4]) const {
        UNROLL for (int step = 0; step < kSteps; step++)
            UNROLL for (int i = 0; i < 4; i++)
                a[step][i] = widen_codes<T>(tile.words[0][i % 2][step] >> i / 2 * 16);
    }
};

constexpr int kThreads = 256;
constexpr int kOutputsOfThread = 8;

// Eight inputs of some outputs a thread, all of which it asks for at once; the last ones of a row may be fewer.
template <typename T>
__global__ void __launch_bounds__(kThreads) widen_fp8_kernel(T* out, const fp8* weight, const float* scales, int64_t outputs,
                                                             int64_t inputs, int64_t stride, bool from_aligned,
                                                             bool to_aligned) {
    begin_kernel();
    const int64_t first = int64_t(blockIdx.y) * kOutputsOfThread;
    const int64_t column = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
    if (column >= inputs) return;
    const int count = int(inputs - column < 8 ? inputs - column : 8);
    Eight<fp8> codes[kOutputsOfThread] = {};
    UNROLL for (int k = 0; k < kOutputsOfThread; k++) {
        if (first + k >= outputs) break;
        const fp8* from = weight + (first + k) * stride + column;
        if (from_aligned && count == 8) {
            codes[k] = load_whole<Eight<fp8>>(from);
        } else {
            UNROLL for (int i = 0; i < 8; i++)
                if (i < count) codes[k].of[i] = from[i];
        }
    }
    UNROLL for (int k = 0; k < kOutputsOfThread; k++) {
        if (first + k >= outputs) break;
        const float scale = scales ? scales[first + k] : 1.0f;
        float eight[8];
        UNROLL for (int i = 0; i < 8; i++) eight[i] = to_float(codes[k].of[i]) * scale;
        store_eight(out + (first + k) * inputs + column, eight, count, to_aligned);
    }
}

template <typename T>
int start_pieces(const LinearArgs& a) {
    const bool from_aligned = is_aligned<fp8>(a.weight, a.weight_stride), to_aligned = a.inputs % 8 == 0;
    return multiply_by_pieces(product_of(a), [&](int64_t first, int64_t count, void* to) {
        const dim3 grid(unsigned((a.inputs + 8 * kThreads - 1) / (8 * kThreads)), unsigned((count + kOutputsOfThread - 1) / kOutputsOfThread));
        return launch("linear", widen_fp8_kernel<T>, grid, kThreads, 0, a.stream, static_cast<T*>(to),
                      static_cast<const fp8*>(a.weight) + first * a.weight_stride, a.scales ? a.scales + first : nullptr,
                      count, a.inputs, a.weight_stride, from_aligned, to_aligned);
    });
}

}  // namespace

int start_linear_fp8(const LinearArgs& a) {
    if (takes_pieces(a.rows, a.inputs, a.is_deterministic))
        return a.dtype == kBFloat16 ? start_pieces<bf16>(a) : start_pieces<fp16>(a);
    return a.dtype == kBFloat16 ? start_matrix<Fp8Weight<bf16>>(a) : start_matrix<Fp8Weight<fp16>>(a);
}
