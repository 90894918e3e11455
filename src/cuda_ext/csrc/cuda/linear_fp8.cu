// The product with a matrix of fp8 (e4m3), each row of it scaled. bfloat16 and half precision hold e4m3 exactly: it becomes
// them in registers, and the scale goes onto an output's whole sum.
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
    static constexpr int kAhead = 2, kPanels = 1;

    __device__ __forceinline__ void widen(const Tile& tile, uint32_t (&a)[kSteps][4]) const {
        UNROLL for (int step = 0; step < kSteps; step++)
            UNROLL for (int i = 0; i < 4; i++)
                a[step][i] = widen_codes<T>(tile.words[step / 2][i % 2][step % 2] >> i / 2 * 16);
    }
};

}  // namespace

int start_linear_fp8(const LinearArgs& a) {
    return a.dtype == kBFloat16 ? start_matrix<Fp8Weight<bf16>>(a) : start_matrix<Fp8Weight<fp16>>(a);
}
