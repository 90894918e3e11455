// Weights that lie in memory as a matrix does, as linear_tile.h takes them, and what linear's two sources share: that of
// plain weights, and that of fp8 ones.
#pragma once

#include "linear_tile.h"

// T: what is multiplied; Stored: a weight's bits.
template <typename T, typename Stored>
struct MatrixWeight {
    using Element = T;
    using Bits = Stored;
    static constexpr int kRun = 8, kScales = 0, kGroups = 0;
    static constexpr int kPerWord = 4 / int(sizeof(Bits)), kWords = kRun / kPerWord;
    static constexpr int kRunBytes = kRun * int(sizeof(Bits)), kSlotBytes = 4 * kWarpSize * kRunBytes;

    const Bits* weight;  // [outputs, inputs]
    int64_t outputs, inputs, stride;
    bool is_aligned;

    // words[half][output g or g + 8]: eight inputs side by side
    struct Tile {
        uint32_t words[2][2][kWords];
    };

    __device__ __forceinline__ Tile load(int64_t panel, int64_t tile) const {
        const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
        Tile to = {};
        UNROLL for (int high = 0; high < 2; high++) {
            const int64_t output = panel * kTileOutputs + g + high * 8;
            if (output >= outputs) continue;
            UNROLL for (int half = 0; half < 2; half++) {
                const int64_t first = tile * kTileInputs + input_of(kRun, 2 * half, t, 0);
                load_run(to.words[half][high], weight + output * stride + first, inputs - first);
            }
        }
        return to;
    }

    // What load would bring, into shared memory.
    __device__ __forceinline__ void fetch(int64_t panel, int64_t tile, uint8_t* slot) const {
        const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
        UNROLL for (int high = 0; high < 2; high++) {
            const int64_t output = panel * kTileOutputs + g + high * 8;
            UNROLL for (int half = 0; half < 2; half++) {
                const int64_t first = tile * kTileInputs + input_of(kRun, 2 * half, t, 0), left = inputs - first;
                uint8_t* to = slot + ((half * 2 + high) * kWarpSize + lane) * kRunBytes;
                const bool is_wanted = output < outputs && left > 0;
                const Bits* from = is_wanted ? weight + output * stride + first : weight;
                if (is_wanted && (!is_aligned || left < kRun)) {
                    uint32_t words[kWords] = {};
                    load_run(words, from, left);
                    UNROLL for (int i = 0; i < kWords; i++) store_whole(to + 4 * i, words[i]);
                } else if constexpr (kRunBytes == 16) {
                    copy_16_bytes(to, from, is_wanted);
                } else {
                    copy_8_bytes(to, from, is_wanted);
                }
            }
        }
    }

    __device__ __forceinline__ Tile take(const uint8_t* slot) const {
        const int lane = int(threadIdx.x) % kWarpSize;
        Tile to;
        UNROLL for (int high = 0; high < 2; high++)
            UNROLL for (int half = 0; half < 2; half++) {
                const uint8_t* mine = slot + ((half * 2 + high) * kWarpSize + lane) * kRunBytes;
                if constexpr (kWords == 4) {
                    const auto words = load_whole<uint4>(mine);
                    to.words[half][high][0] = words.x, to.words[half][high][1] = words.y;
                    to.words[half][high][2] = words.z, to.words[half][high][3] = words.w;
                } else {
                    const auto words = load_whole<uint2>(mine);
                    to.words[half][high][0] = words.x, to.words[half][high][1] = words.y;
                }
            }
        return to;
    }

    // Zeros from ``left`` on.
    __device__ __forceinline__ void load_run(uint32_t (&to)[kWords], const Bits* from, int64_t left) const {
        if (is_aligned && left >= kRun) {
            if constexpr (kWords == 4) {
                const uint4 words = load_once(reinterpret_cast<const uint4*>(from));
                to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
            } else {
                const uint2 words = load_once(reinterpret_cast<const uint2*>(from));
                to[0] = words.x, to[1] = words.y;
            }
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
    const bool is_aligned = ::is_aligned<Bits>(a.weight, a.weight_stride);
    const Weight weight{{static_cast<const Bits*>(a.weight), a.outputs, a.inputs, a.weight_stride, is_aligned}};
    const LinearRows rows{a.out,     a.x,          a.scales,     a.bias,      a.rows,            a.inputs,
                          a.outputs, a.row_stride, a.out_stride, a.out_dtype, a.is_deterministic};
    return start_linear("linear", rows, weight, a.stream);
}

int start_linear_fp8(const LinearArgs& a);
