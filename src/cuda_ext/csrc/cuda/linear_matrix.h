// Weights that lie in memory as a matrix does, as linear_tile.h takes them, and what linear's two sources share: that of
// plain weights, and that of fp8 ones.
#pragma once

#include "linear_tile.h"

// T: what is multiplied; Stored: a weight's bits.
template <typename T, typename Stored>
struct MatrixWeight {
    using Element = T;
    using Bits = Stored;
    static constexpr int kRunBytes = 16, kRun = kRunBytes / int(sizeof(Bits)), kRuns = kTileInputs / (4 * kRun);
    static constexpr int kScales = 0, kGroups = 0;
    static constexpr int kWords = 4, kPerWord = kRun / kWords, kSlotBytes = 2 * kRuns * kWarpSize * kRunBytes;

    const Bits* weight;  // [outputs, inputs]
    int64_t outputs, inputs, stride;
    bool is_aligned;

    // words[run][output g or g + 8]: inputs side by side
    struct Tile {
        uint32_t words[kRuns][2][kWords];
    };

    __device__ __forceinline__ Tile load(int64_t panel, int64_t tile) const {
        const int lane = int(threadIdx.x % kWarpSize), g = lane / 4, t = lane % 4;
        Tile to = {};
        UNROLL for (int high = 0; high < 2; high++) {
            const int64_t output = panel * kTileOutputs + g + high * 8;
            if (output >= outputs) continue;
            UNROLL for (int run = 0; run < kRuns; run++) {
                const int64_t first = tile * kTileInputs + (4 * run + t) * kRun;
                load_run(to.words[run][high], weight + output * stride + first, inputs - first);
            }
        }
        return to;
    }

    __device__ __forceinline__ void fetch(int panel, int tile, uint8_t* slot) const {
        const int lane = int(threadIdx.x % kWarpSize), g = lane / 4, t = lane % 4;
        UNROLL for (int high = 0; high < 2; high++) {
            const int output = panel * kTileOutputs + g + high * 8;
            const Bits* row = weight + output * stride;
            UNROLL for (int run = 0; run < kRuns; run++) {
                const int first = tile * kTileInputs + (4 * run + t) * kRun, left = int(inputs) - first;
                uint8_t* to = slot + ((run * 2 + high) * kWarpSize + lane) * kRunBytes;
                const bool is_there = output < int(outputs) && left > 0;
                if (!is_there || (is_aligned && left >= kRun)) {
                    copy_16_bytes<true>(to, is_there ? row + first : weight, is_there);
                } else {
                    uint32_t words[kWords] = {};
                    load_run(words, row + first, left);
                    store_whole(to, uint4{words[0], words[1], words[2], words[3]});
                }
            }
        }
    }

    __device__ __forceinline__ Tile take(const uint8_t* slot) const {
        const int lane = int(threadIdx.x % kWarpSize);
        Tile to;
        UNROLL for (int high = 0; high < 2; high++)
            UNROLL for (int run = 0; run < kRuns; run++) {
                const auto words = load_whole<uint4>(slot + ((run * 2 + high) * kWarpSize + lane) * kRunBytes);
                to.words[run][high][0] = words.x, to.words[run][high][1] = words.y;
                to.words[run][high][2] = words.z, to.words[run][high][3] = words.w;
            }
        return to;
    }

    // Zeros from ``left`` on.
    __device__ __forceinline__ void load_run(uint32_t (&to)[kWords], const Bits* from, int64_t left) const {
        if (is_aligned && left >= kRun) {
            const uint4 words = load_once(reinterpret_cast<const uint4*>(from));
            to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
            return;
        }
        UNROLL for (int i = 0; i < kRun; i++)
            if (i < left) to[i / kPerWord] |= uint32_t(from[i]) << i % kPerWord * (32 / kPerWord);
    }

    __device__ __forceinline__ void add(const Tile&, const uint32_t (&a)[kSteps][4], const uint32_t (&x)[kSteps][2],
                                        const float (&)[1][4], float (&sums)[4]) const {
        UNROLL for (int step = 0; step < kSteps; step++) multiply_tile<T>(sums, a[step], x[step]);
    }
};

template <typename Weight>
int start_matrix(const LinearArgs& a) {
    using Bits = typename Weight::Bits;
    const auto place = reinterpret_cast<uintptr_t>(a.weight);
    const bool is_aligned = (place | uintptr_t(a.weight_stride) * sizeof(Bits)) % Weight::kRunBytes == 0;
    const Weight weight{{static_cast<const Bits*>(a.weight), a.outputs, a.inputs, a.weight_stride, is_aligned}};
    const LinearRows rows{a.out,     a.x,          a.scales,     a.bias,      a.rows,            a.inputs,
                          a.outputs, a.row_stride, a.out_stride, a.out_dtype, a.is_deterministic};
    return start_linear("linear", rows, weight, a.stream);
}

int start_linear_fp8(const LinearArgs& a);
