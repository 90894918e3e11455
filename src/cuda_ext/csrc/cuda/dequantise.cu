// Panels of a quantised weight as a plain matrix. A block a tile; a thread does eight columns of a row.
#include "launch.h"
#include "quantised.h"

namespace {

constexpr int kThreads = kTileOutputs * kTileInputs / 8;

template <typename T, int Bits, int Group, bool HasOffset>
__global__ void __launch_bounds__(kThreads) dequantise_kernel(DequantiseArgs a, bool aligned) {
    constexpr WeightFormat kFormat{Bits, Group, HasOffset};
    const int64_t tile = blockIdx.x, panel = blockIdx.y;
    const auto* from = static_cast<const uint8_t*>(a.panels) + (panel * gridDim.x + tile) * kFormat.tile_bytes();
    const int output = int(threadIdx.x) / 8, first = int(threadIdx.x) % 8 * 8;
    const int64_t row = panel * kTileOutputs + output, column = tile * kTileInputs + first;
    if (row >= a.rows || column >= a.columns) return;
    float eight[8];
    UNROLL for (int i = 0; i < 8; i++) eight[i] = weight_at(from, kFormat, output, first + i);
    const int count = int(a.columns - column < 8 ? a.columns - column : 8);
    store_eight(static_cast<T*>(a.out) + row * a.columns + column, eight, count, aligned);
}

template <typename T, int Bits, int Group, bool HasOffset>
int start(const DequantiseArgs& a) {
    const dim3 grid(unsigned(tiles_of(a.columns)), unsigned((a.rows + kTileOutputs - 1) / kTileOutputs));
    const bool aligned = is_aligned<T>(a.out, a.columns);
    return launch("dequantise", dequantise_kernel<T, Bits, Group, HasOffset>, grid, kThreads, 0, a.stream, a, aligned);
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
