// A matrix of codes and scales, as checkpoints have it, to the panels that linear_quantised streams. A block a tile; once
// at load, so nothing here is fast.
#include "launch.h"
#include "quantised.h"

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) pack_quantised_kernel(PackQuantisedArgs a, WeightFormat format) {
    begin_kernel();
    const int64_t tile = blockIdx.x, panel = blockIdx.y, columns = a.groups * a.group;
    auto* to = static_cast<uint8_t*>(a.panels) + (panel * gridDim.x + tile) * format.tile_bytes();
    const auto code_of = [&](int output, int input) {
        const int64_t row = panel * kTileOutputs + output, column = tile * kTileInputs + input;
        return row < a.rows && column < columns ? int(a.codes[row * columns + column]) : format.zero();
    };
    const int codes_of_byte = 8 / format.bits;
    for (int i = int(threadIdx.x); i < kTileOutputs * kTileInputs; i += kThreads) {
        const int output = i / kTileInputs, input = i % kTileInputs;
        const CodePlace place = code_place(format, output, input);
        if (place.shift) continue;  // the byte's other thread writes it
        int byte = code_of(output, input);
        // A high half holds the same input of output + 8.
        if (codes_of_byte == 2) byte |= code_of(output + 8, input) << 4;
        to[place.byte] = uint8_t(byte);
    }
    for (int i = int(threadIdx.x); i < kTileOutputs * format.groups(); i += kThreads) {
        const int output = i / format.groups(), group = i % format.groups();
        const int64_t row = panel * kTileOutputs + output, at = tile * format.groups() + group;
        const bool is_inside = row < a.rows && at < a.groups;
        auto* scales = reinterpret_cast<uint16_t*>(to + format.code_bytes());
        auto* scale = scales + scale_place(format, output, group * format.group);
        *scale = is_inside ? static_cast<const uint16_t*>(a.scales)[row * a.groups + at] : uint16_t(0);
        if (format.has_offset)
            scale[format.scale_bytes() / 2] =
                is_inside ? static_cast<const uint16_t*>(a.offsets)[row * a.groups + at] : uint16_t(0);
    }
}

}  // namespace

extern "C" EXPORT int shoal_pack_quantised(const PackQuantisedArgs* a) {
    const WeightFormat format{int(a->bits), int(a->group), a->offsets != nullptr};
    if (!format.exists()) return kNotSupported;
    const dim3 grid(unsigned(tiles_of(a->groups * a->group)), unsigned((a->rows + kTileOutputs - 1) / kTileOutputs));
    return launch("pack_quantised", pack_quantised_kernel, grid, kThreads, 0, a->stream, *a, format);
}
