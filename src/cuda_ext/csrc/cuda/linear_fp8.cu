// The product with a matrix of fp8 (e4m3), each row of it scaled. bfloat16 and half precision hold e4m3 exactly: it becomes
// them in registers, and the scale goes onto an output's whole sum.
#include "linear_fp8.h"

namespace {

// a · b, two elements each
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
    std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2> x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    const auto product = __hmul2(x, y);
    memcpy(&a, &product, sizeof a);
    return a;
#else
    const auto half = [](uint32_t pair, int which) { return to_float(T{uint16_t(pair >> 16 * which)}); };
    return pair_of<T>(half(a, 0) * half(b, 0), half(a, 1) * half(b, 1));
#endif
}

// Bytes 0 and 1 of ``codes`` as a pair. With its exponent in the place of T's a number is too small by a power of two,
// subnormal ones too. Codes are finite.
template <typename T>
__device__ __forceinline__ uint32_t widen_codes(uint32_t codes) {
    constexpr bool kIsBfloat16 = std::is_same_v<T, bf16>;
    constexpr uint32_t kPower = kIsBfloat16 ? 0x7b807b80 : 0x5c005c00;  // 2^120, 2^8
    const uint32_t bytes = (codes & 0xff) | (codes & 0xff00) << 8;
    const uint32_t signs = (bytes & 0x00800080) << 8, sizes = (bytes & 0x007f007f) << (kIsBfloat16 ? 4 : 7);
    return multiply_pairs<T>(signs | sizes, kPower);
}

template <typename T>
struct Fp8Weight {
    using Element = T;
    static constexpr int kRun = 8, kAhead = 4, kPanels = 1, kScales = 0, kGroups = 0;

    const uint8_t* weight;  // [outputs, inputs]
    int64_t outputs, inputs, stride;
    bool is_aligned;

    // codes[half][output g or g + 8]: eight inputs side by side
    struct Tile {
        uint32_t codes[2][2][2];
    };

    __device__ __forceinline__ Tile load(int64_t panel, int64_t tile) const {
        const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
        Tile to = {};
        UNROLL for (int high = 0; high < 2; high++) {
            const int64_t output = panel * kTileOutputs + g + high * 8;
            if (output >= outputs) continue;
            UNROLL for (int half = 0; half < 2; half++) {
                const int64_t first = tile * kTileInputs + input_of(kRun, 2 * half, t, 0);
                const uint8_t* from = weight + output * stride + first;
                uint32_t(&codes)[2] = to.codes[half][high];
                if (is_aligned && inputs - first >= kRun) {
                    const uint2 words = load_once(reinterpret_cast<const uint2*>(from));
                    codes[0] = words.x, codes[1] = words.y;
                } else {
                    UNROLL for (int i = 0; i < kRun; i++)
                        if (first + i < inputs) codes[i / 4] |= uint32_t(from[i]) << i % 4 * 8;
                }
            }
        }
        return to;
    }

    __device__ __forceinline__ void widen(const Tile& tile, uint32_t (&a)[kSteps][4]) const {
        UNROLL for (int step = 0; step < kSteps; step++)
            UNROLL for (int i = 0; i < 4; i++)
                a[step][i] = widen_codes<T>(tile.codes[step / 2][i % 2][step % 2] >> i / 2 * 16);
    }

    __device__ __forceinline__ void add(const Tile&, const uint32_t (&a)[kSteps][4], const uint32_t (&x)[kSteps][2],
                                        const float (&)[1][4], float (&sums)[4]) const {
        UNROLL for (int step = 0; step < kSteps; step++) multiply_tile<T>(sums, a[step], x[step]);
    }
};

template <typename T>
int start(const LinearArgs& a) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(a.weight) % 8 == 0 && a.weight_stride % 8 == 0;
    const Fp8Weight<T> weight{static_cast<const uint8_t*>(a.weight), a.outputs, a.inputs, a.weight_stride, is_aligned};
    return start_linear("linear", rows_of(a), weight, a.stream);
}

}  // namespace

int start_linear_fp8(const LinearArgs& a) { return a.dtype == kBFloat16 ? start<bf16>(a) : start<fp16>(a); }
