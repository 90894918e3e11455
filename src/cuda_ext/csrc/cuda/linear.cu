// The product with a plain matrix of bfloat16 or half precision.
#include "linear_fp8.h"

namespace {

template <typename T>
struct PlainWeight {
    using Element = T;
    static constexpr int kRun = 8, kAhead = 2, kPanels = 2, kScales = 0, kGroups = 0;

    const T* weight;  // [outputs, inputs]
    int64_t outputs, inputs, stride;
    bool is_aligned;

    // pairs[half][output g or g + 8]: eight inputs side by side
    struct Tile {
        uint32_t pairs[2][2][4];
    };

    __device__ __forceinline__ Tile load(int64_t panel, int64_t tile) const {
        const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
        Tile to = {};
        UNROLL for (int high = 0; high < 2; high++) {
            const int64_t output = panel * kTileOutputs + g + high * 8;
            if (output >= outputs) continue;
            UNROLL for (int half = 0; half < 2; half++) {
                const int64_t first = tile * kTileInputs + input_of(kRun, 2 * half, t, 0);
                const T* from = weight + output * stride + first;
                uint32_t(&pairs)[4] = to.pairs[half][high];
                if (is_aligned && inputs - first >= kRun) {
                    const uint4 words = load_once(reinterpret_cast<const uint4*>(from));
                    pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
                } else {
                    load_pairs<kRun>(pairs, from, inputs - first, false);
                }
            }
        }
        return to;
    }

    __device__ __forceinline__ void widen(const Tile& tile, uint32_t (&a)[kSteps][4]) const {
        UNROLL for (int step = 0; step < kSteps; step++)
            UNROLL for (int i = 0; i < 4; i++) a[step][i] = tile.pairs[step / 2][i % 2][step % 2 * 2 + i / 2];
    }

    __device__ __forceinline__ void add(const Tile&, const uint32_t (&a)[kSteps][4], const uint32_t (&x)[kSteps][2],
                                        const float (&)[1][4], float (&sums)[4]) const {
        UNROLL for (int step = 0; step < kSteps; step++) multiply_tile<T>(sums, a[step], x[step]);
    }
};

template <typename T>
int start(const LinearArgs& a) {
    const PlainWeight<T> weight{static_cast<const T*>(a.weight), a.outputs, a.inputs, a.weight_stride,
                                is_aligned<T>(a.weight, a.weight_stride)};
    return start_linear("linear", rows_of(a), weight, a.stream);
}

}  // namespace

extern "C" EXPORT int shoal_linear(const LinearArgs* a) {
    if (a->out_dtype != kFloat32 && a->out_dtype != a->dtype) return kNotSupported;
    if (a->weight_dtype == kFloat8) return start_linear_fp8(*a);
    if (a->weight_dtype != a->dtype) return kNotSupported;
    return a->dtype == kBFloat16 ? start<bf16>(*a) : start<fp16>(*a);
}
