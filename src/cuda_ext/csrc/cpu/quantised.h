// How rows of activations and panels of weights lie when both are integers.
//
// A row of activations: codes of 8 bits, and one scale for each 32 of them (its last group is padded with zeros).
// Activations have outliers, next to which 8 bits would round away all else in a group, and which turn near ties. So a
// group's largest may lie apart, as the float it was, and counts as zero among the others.
// A weight: panels of 16 outputs; a panel is one block after the other, a block a group of inputs of all 16 outputs:
//   W8, groups of 32 or 16: a line of 64 bytes for each 4 inputs, 4 bytes an output, each code + 128
//   W4, groups of 32: line i holds inputs 4i to 4i + 3 in the low halves, inputs 16 + 4i to 19 + 4i in the high ones
// or, for tiles, which take output after output (tile_weights.h):
//   W8: one output's codes after the other's
//   W4: line i has 16 bits for each input: the codes of outputs 4i (in the lowest bits) to 4i + 3
// and then 16 half-precision scales and, with offsets, 16 half-precision offsets. A weight is scale · (code − zero) +
// offset; zero is 8 for W4 without offsets and 0 otherwise.
#pragma once

#include <cstdint>

constexpr int64_t kPanel = 16;   // outputs
constexpr int64_t kGroup = 32;   // activations under one scale
constexpr int64_t kLine = 64;    // bytes: 4 inputs of a panel, or 8 with half a byte each

struct WeightFormat {
    int64_t bits, group;
    bool has_offset;

    constexpr int64_t lines() const { return group * bits / 32; }
    constexpr int64_t block_bytes() const { return lines() * kLine + (has_offset ? 64 : 32); }
    constexpr int64_t groups(int64_t inputs) const { return (inputs + kGroup - 1) / kGroup * kGroup / group; }
    constexpr int64_t panel_bytes(int64_t inputs) const { return groups(inputs) * block_bytes(); }
    // Where in a block a code lies: its byte, and for W4 whether in the byte's upper half.
    struct Place {
        int64_t byte;
        bool upper;
    };
    constexpr Place place(int64_t output, int64_t input, bool for_tiles) const {
        if (for_tiles)
            return bits == 8 ? Place{output * group + input, false}
                             : Place{output / 4 * kLine + input * 2 + output % 4 / 2, output % 2 == 1};
        return {(bits == 4 ? input % 16 / 4 : input / 4) * kLine + output * 4 + input % 4, bits == 4 && input >= 16};
    }
    constexpr int zero() const { return bits == 8 ? 128 : has_offset ? 0 : 8; }
};

struct QuantisedGroup {
    int8_t codes[kGroup];
    float scale;
    float scaled_sum;      // scale · sum of codes
    int32_t first_sum;     // of the first 16 codes
    int32_t sum_8, sum_128;  // 8 and 128 · sum of codes: what W4 and W8 are off by
};

constexpr uint8_t kNoOutlier = 255;

// A row: its groups; of each group the outlier, and its place in the group or kNoOutlier, up to a multiple of 16 of them;
// padded to whole cache lines.
struct QuantisedRow {
    QuantisedGroup* groups;
    float* outliers;
    uint8_t* places;

    static constexpr int64_t kPlacesAtOnce = 16;

    static int64_t count(int64_t inputs) { return (inputs + kGroup - 1) / kGroup; }
    static int64_t place_count(int64_t inputs) { return (count(inputs) + kPlacesAtOnce - 1) / kPlacesAtOnce * kPlacesAtOnce; }
    static int64_t bytes(int64_t inputs) {
        const int64_t groups = count(inputs) * int64_t(sizeof(QuantisedGroup) + sizeof(float));
        return (groups + place_count(inputs) + 63) / 64 * 64;
    }

    static QuantisedRow at(void* rows, int64_t row, int64_t inputs) {
        auto* groups = reinterpret_cast<QuantisedGroup*>(static_cast<char*>(rows) + row * bytes(inputs));
        auto* outliers = reinterpret_cast<float*>(groups + count(inputs));
        return {groups, outliers, reinterpret_cast<uint8_t*>(outliers + count(inputs))};
    }
};
