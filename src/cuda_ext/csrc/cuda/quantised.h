// How a quantised weight lies so that a warp streams it in the order of its tile products.
//
// A tile is 16 outputs × 64 inputs, a panel the tiles of 16 outputs, one behind the other; the last ones are padded
// with weights of zero. In step s of four, lane 4 · g + t holds weights of the outputs g and g + 8 and of four inputs,
// those that m16n8k16 takes from it in a step: which of the 64 they are is ours to choose, as long as activations are
// laid alike, and is ``input_of``: a lane takes ``run`` inputs side by side. A tile is
//   codes: of 4 bits: 32 lanes × 4 steps × 4 bytes; of 8 bits: 2 halves × 32 lanes × 2 steps × 8 bytes
//   scales: 8 g × groups × (output g, output g + 8), half precision; then offsets alike where there are some
// Register i of a fragment's four has nibbles i and i + 4 of a step's word, or bytes i % 2 and i % 2 + 2 of its word i / 2.
// A weight is scale · (code − zero) + offset; zero is 128 for 8 bits, 8 for 4 bits without offsets, else 0.
#pragma once

#include "device.h"

constexpr int kTileOutputs = 16;
constexpr int kTileInputs = 64;
constexpr int kSteps = 4;

struct WeightFormat {
    int bits, group;
    bool has_offset;

    __host__ __device__ constexpr bool exists() const {
        return (bits == 4 && group == 32) || (bits == 8 && (group == 16 || group == 32));
    }
    __host__ __device__ constexpr int run() const { return group / 4; }
    __host__ __device__ constexpr int groups() const { return kTileInputs / group; }  // of a tile
    __host__ __device__ constexpr int zero() const { return bits == 8 ? 128 : has_offset ? 0 : 8; }
    __host__ __device__ constexpr int code_bytes() const { return kTileOutputs * kTileInputs * bits / 8; }
    __host__ __device__ constexpr int scale_bytes() const { return kTileOutputs * groups() * 2; }
    __host__ __device__ constexpr int tile_bytes() const { return code_bytes() + scale_bytes() * (has_offset ? 2 : 1); }
};

__host__ __device__ constexpr int64_t tiles_of(int64_t inputs) { return (inputs + kTileInputs - 1) / kTileInputs; }

// The j-th of the four inputs of lane 4 · g + t in a step.
__host__ __device__ constexpr int input_of(int run, int step, int t, int j) {
    return step / (run / 4) * (4 * run) + t * run + step % (run / 4) * 4 + j;
}

// Where a weight's code is in its tile: a byte, and how far its bits are shifted in it.
struct CodePlace {
    int byte, shift;
};

__host__ __device__ constexpr CodePlace code_place(const WeightFormat& format, int output, int input) {
    const int run = format.run(), span = 4 * run;
    const int step = input / span * (run / 4) + input % run / 4, t = input % span / run, j = input % 4;
    const int lane = output % 8 * 4 + t, high_output = output / 8, second = j % 2;
    if (format.bits == 4) {
        const int nibble = high_output + 2 * (j / 2) + 4 * second;
        return {lane * 16 + step * 4 + nibble / 2, nibble % 2 * 4};
    }
    return {step / 2 * 512 + lane * 16 + step % 2 * 8 + j / 2 * 4 + high_output + 2 * second, 0};
}

// The place of a scale behind the codes, in half-precision numbers.
__host__ __device__ constexpr int scale_place(const WeightFormat& format, int output, int input) {
    return (output % 8 * format.groups() + input / format.group) * 2 + output / 8;
}

// One weight of a tile.
__device__ __forceinline__ float weight_at(const uint8_t* tile, const WeightFormat& format, int output, int input) {
    const CodePlace place = code_place(format, output, input);
    const int code = tile[place.byte] >> place.shift & (format.bits == 4 ? 15 : 255);
    const auto* scales = reinterpret_cast<const fp16*>(tile + format.code_bytes()) + scale_place(format, output, input);
    const float offset = format.has_offset ? to_float(scales[format.scale_bytes() / 2]) : 0.0f;
    return float(code - format.zero()) * to_float(*scales) + offset;
}
