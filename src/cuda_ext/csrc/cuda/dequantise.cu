// Panels of a quantised weight as a plain matrix. A block a tile; a thread does eight columns of a row.
#include "launch.h"
#include "quantised.h"

namespace {

constexpr int kThreads = kTileOutputs * kTileInputs / 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantise_kernel(DequantiseArgs a, WeightFormat format, bool aligned) {
    begin_kernel();
    const int64_t tile = blockIdx.x, panel = blockIdx.y;
    const auto* from = static_cast<const uint8_t*>(a.panels) + (panel * gridDim.x + tile) * format.tile_bytes();
    const int output = int(threadIdx.x) / 8, first = int(threadIdx.x) % 8 * 8;
    const int64_t row = panel * kTileOutputs + output, column = tile * kTileInputs + first;
    if (row >= a.rows || column >= a.columns) return;
    float eight[8];
    UNROLL for (int i = 0; i < 8; i++) eight[i] = weight_at(from, format, output, first + i);
    const int count = int(a.columns - column < 8 ? a.columns - column : 8);
    store_eight(static_cast<T*>(a.out) + row * a.columns + column, eight, count, aligned);
}

template <typename T>
int start(const DequantiseArgs& a, const WeightFormat& format) {
    const dim3 grid(unsigned(tiles_of(a.columns)), unsigned((a.rows + kTileOutputs - 1) / kTileOutputs));
    const bool aligned = is_aligned<T>(a.out, a.columns);
    return launch("dequantise", dequantise_kernel<T>, grid, kThreads, 0, a.stream, a, format, aligned);
}

}  // namespace

extern "C" EXPORT int shoal_dequantise(const DequantiseArgs* a) {
    const WeightFormat format{int(a->bits), int(a->group), a->has_offset != 0};
    if (!format.exists()) return kNotSupported;
    switch (a->dtype) {
        case kBFloat16: return start<bf16>(*a, format);
        case kFloat16: return start<fp16>(*a, format);
        default: return kNotSupported;
    }
}
