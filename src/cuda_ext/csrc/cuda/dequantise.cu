// Panels of a quantised weight as a plain matrix. A warp does some tiles of a panel, all of which it asks for at once; a lane
// has runs of inputs side by side (quantised.h), and writes each as it is.
#include "linear_quantised.h"

namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kTilesOfWarp = 4;

template <typename T, int Bits, int Group, bool HasOffset>
struct Dequantised {
    using Weight = QuantisedWeight<T, Bits, Group, HasOffset>;
    static constexpr int kRun = Weight::kRun, kStepsOfRun = kRun / 4;

    const DequantiseArgs& a;
    bool is_aligned;

    // The run of inputs that begins with the step-th step, of output g or g + 8.
    __device__ __forceinline__ void store_run(const typename Weight::Tile& tile, const uint32_t (&codes)[kSteps][4], int step,
                                              int high, int64_t row, int64_t column) const {
        const int group = step / kStepsOfRun * (4 * kRun) / Group;
        const float scale = element_of<fp16>(tile.scales[group], high);
        const float offset = HasOffset ? element_of<fp16>(tile.offsets[group], high) : 0.0f;
        uint32_t pairs[kRun / 2];
        UNROLL for (int i = 0; i < kRun / 2; i++) {
            const uint32_t pair = codes[step + i / 2][high + i % 2 * 2];
            pairs[i] = pair_of<T>(fmaf(element_of<T>(pair, 0), scale, offset), fmaf(element_of<T>(pair, 1), scale, offset));
        }
        T* const out = static_cast<T*>(a.out) + row * a.columns + column;
        if (is_aligned && column + kRun <= a.columns) {
            if constexpr (kRun == 8)
                store_whole(out, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
            else
                store_whole(out, uint2{pairs[0], pairs[1]});
            return;
        }
        UNROLL for (int i = 0; i < kRun; i++)
            if (column + i < a.columns) out[i] = from_float<T>(element_of<T>(pairs[i / 2], i % 2));
    }

    __device__ __forceinline__ void store(const typename Weight::Tile& tile, int64_t panel, int64_t first) const {
        const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
        uint32_t codes[kSteps][4];
        Weight{}.widen(tile, codes);
        UNROLL for (int step = 0; step < kSteps; step += kStepsOfRun)
            UNROLL for (int high = 0; high < 2; high++) {
                const int64_t row = panel * kTileOutputs + g + 8 * high;
                if (row < a.rows) store_run(tile, codes, step, high, row, first + input_of(kRun, step, t, 0));
            }
    }
};

template <typename T, int Bits, int Group, bool HasOffset>
__global__ void __launch_bounds__(kThreads) dequantise_kernel(DequantiseArgs a, bool is_aligned) {
    begin_kernel();
    using Weight = QuantisedWeight<T, Bits, Group, HasOffset>;
    const int64_t tiles = tiles_of(a.columns), panel = blockIdx.y;
    const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize) * kTilesOfWarp;
    const Weight weight{static_cast<const uint8_t*>(a.panels), int(tiles)};
    typename Weight::Tile mine[kTilesOfWarp];
    UNROLL for (int i = 0; i < kTilesOfWarp; i++)
        if (first + i < tiles) mine[i] = weight.load(panel, first + i);
    const Dequantised<T, Bits, Group, HasOffset> to{a, is_aligned};
    UNROLL for (int i = 0; i < kTilesOfWarp; i++)
        if (first + i < tiles) to.store(mine[i], panel, (first + i) * kTileInputs);
}

template <typename T, int Bits, int Group, bool HasOffset>
int start(const DequantiseArgs& a) {
    constexpr int kTilesOfBlock = kWarps * kTilesOfWarp;
    const int64_t blocks = (tiles_of(a.columns) + kTilesOfBlock - 1) / kTilesOfBlock;
    const dim3 grid(unsigned(blocks), unsigned((a.rows + kTileOutputs - 1) / kTileOutputs));
    return launch("dequantise", dequantise_kernel<T, Bits, Group, HasOffset>, grid, kThreads, 0, a.stream, a,
                  is_aligned<T>(a.out, a.columns));
}

template <typename T, int Bits, int Group>
int start(const DequantiseArgs& a) {
    return a.has_offset ? start<T, Bits, Group, true>(a) : start<T, Bits, Group, false>(a);
}

// Of a format that exists.
template <typename T>
int start(const DequantiseArgs& a) {
    if (a.bits == 4) return start<T, 4, 32>(a);
    return a.group == 32 ? start<T, 8, 32>(a) : start<T, 8, 16>(a);
}

}  // namespace

extern "C" EXPORT int shoal_dequantise(const DequantiseArgs* a) {
    const WeightFormat format{int(a->bits), int(a->group), a->has_offset != 0};
    if (!format.exists()) return kNotSupported;
    switch (a->dtype) {
        case kBFloat16: return start<bf16>(*a);
        case kFloat16: return start<fp16>(*a);
        default: return kNotSupported;
    }
}
