// Quantised weights as linear_tile.h takes them. Codes are small integers, which bfloat16 and half precision hold exactly:
// they become it in registers without rounding, a group's products are added up in float32, and its scale and offset are
// applied to the sum, the offset with the group's sum of x (a product with ones).
#pragma once

#include "linear_tile.h"

template <typename T, int Bits, int Group, bool HasOffset>
struct QuantisedWeight {
    using Element = T;
    static constexpr WeightFormat kFormat{Bits, Group, HasOffset};
    static constexpr int kRun = kFormat.run(), kPanels = 1;
    static constexpr int kAhead[2] = {Bits == 4 ? 3 : 2, Bits == 4 ? 5 : 3};
    static constexpr int kScales = kFormat.groups(), kGroups = HasOffset ? kScales : 0;
    static constexpr int kSlotBytes = kFormat.tile_bytes();

    const uint8_t* panels;
    int tiles;  // of a panel

    // scales, offsets: one for output g low, one for g + 8 high
    struct Tile {
        uint32_t codes[kSteps * Bits / 4];
        uint32_t scales[kScales], offsets[kScales];
    };

    static __device__ __forceinline__ void load_scales(uint32_t (&to)[kScales], const uint8_t* from) {
        if constexpr (kScales == 2) {
            const uint2 words = load_once(reinterpret_cast<const uint2*>(from));
            to[0] = words.x, to[1] = words.y;
        } else {
            const uint4 words = load_once(reinterpret_cast<const uint4*>(from));
            to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
        }
    }

    __device__ __forceinline__ Tile load(int panel, int tile) const {
        const int lane = int(threadIdx.x % kWarpSize), g = lane / 4;
        const uint8_t* from = panels + uint64_t(uint32_t(panel * tiles + tile)) * kFormat.tile_bytes();
        Tile to;
        UNROLL for (int half = 0; half < Bits / 4; half++) {
            const uint4 words = load_once(reinterpret_cast<const uint4*>(from + half * 512 + lane * 16));
            to.codes[4 * half] = words.x, to.codes[4 * half + 1] = words.y;
            to.codes[4 * half + 2] = words.z, to.codes[4 * half + 3] = words.w;
        }
        const uint8_t* scales = from + kFormat.code_bytes();
        load_scales(to.scales, scales + g * kScales * 4);
        if constexpr (HasOffset) load_scales(to.offsets, scales + kFormat.scale_bytes() + g * kScales * 4);
        return to;
    }

    __device__ __forceinline__ void fetch(int panel, int tile, uint8_t* slot) const {
        const int lane = int(threadIdx.x % kWarpSize);
        const uint8_t* from = panels + uint64_t(uint32_t(panel * tiles + tile)) * kFormat.tile_bytes();
        UNROLL for (int i = 0; i < kSlotBytes; i += 16 * kWarpSize)
            if (i + lane * 16 < kSlotBytes) copy_16_bytes<true>(slot + i + lane * 16, from + i + lane * 16, true);
    }

    static __device__ __forceinline__ void take_scales(uint32_t (&to)[kScales], const uint8_t* from) {
        if constexpr (kScales == 2) {
            const auto words = load_whole<uint2>(from);
            to[0] = words.x, to[1] = words.y;
        } else {
            const auto words = load_whole<uint4>(from);
            to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
        }
    }

    __device__ __forceinline__ Tile take(const uint8_t* slot) const {
        const int lane = int(threadIdx.x % kWarpSize), g = lane / 4;
        Tile to;
        UNROLL for (int half = 0; half < Bits / 4; half++) {
            const auto words = load_whole<uint4>(slot + half * 512 + lane * 16);
            to.codes[4 * half] = words.x, to.codes[4 * half + 1] = words.y;
            to.codes[4 * half + 2] = words.z, to.codes[4 * half + 3] = words.w;
        }
        const uint8_t* scales = slot + kFormat.code_bytes() + g * kScales * 4;
        take_scales(to.scales, scales);
        if constexpr (HasOffset) take_scales(to.offsets, scales + kFormat.scale_bytes());
        return to;
    }

    // The codes less the format's zero: the bits of a power of two, whose last place is 1, take a code as their last ones.
    __device__ __forceinline__ void widen(const Tile& tile, uint32_t (&a)[kSteps][4]) const {
        constexpr bool kIsBfloat16 = std::is_same_v<T, bf16>;
        constexpr uint32_t kPower = kIsBfloat16 ? 0x43004300 : 0x64006400;  // 128; 1024
        constexpr uint32_t kMask = Bits == 4 ? 0x000f000f : kIsBfloat16 ? 0x007f007f : 0x00ff00ff;
        const auto difference = [](auto code, auto zero) { return code - zero; };
        UNROLL for (int step = 0; step < kSteps; step++)
            UNROLL for (int i = 0; i < 4; i++) {
                const uint32_t word = tile.codes[Bits == 4 ? step : 2 * step + i / 2];
                const uint32_t codes = word >> Bits * (Bits == 4 ? i : i % 2);
                uint32_t zero = kPower + kFormat.zero() * 0x00010001;
                // 128 holds no more than seven bits: the eighth goes into what is taken off.
                if constexpr (Bits == 8 && kIsBfloat16) zero = (codes & 0x00800080) ^ 0x43804380;
                a[step][i] = of_pairs<T>(take_bits(codes, kMask, kPower), zero, difference);
            }
    }

    // A group's sum of products, without its offset.
    __device__ __forceinline__ void scale_group(const Tile& tile, int group, const float (&product)[4],
                                                float (&sums)[4]) const {
        UNROLL for (int i = 0; i < 4; i++) sums[i] = fmaf(element_of<fp16>(tile.scales[group], i / 2), product[i], sums[i]);
    }

    __device__ __forceinline__ void add_group(const Tile& tile, int group, const float (&product)[4],
                                              const float (&of_x)[4], float (&sums)[4]) const {
        scale_group(tile, group, product, sums);
        if constexpr (HasOffset)
            UNROLL for (int i = 0; i < 4; i++)
                sums[i] = fmaf(element_of<fp16>(tile.offsets[group], i / 2), of_x[i], sums[i]);
    }

    // Of groups 2 · pair and 2 · pair + 1, each in two columns: multiply_floats' left side.
    __device__ __forceinline__ void offsets_of(const Tile& tile, int pair, float (&a)[2]) const {
        const uint32_t both = threadIdx.x % 4 < 2 ? tile.offsets[2 * pair] : tile.offsets[2 * pair + 1];
        a[0] = element_of<fp16>(both, 0), a[1] = element_of<fp16>(both, 1);
    }

    __device__ __forceinline__ void add(const Tile& tile, const uint32_t (&a)[kSteps][4], const uint32_t (&x)[kSteps][2],
                                        const float (&of_x)[kGroups + 1][4], float (&sums)[4]) const {
        constexpr int kStepsOfGroup = kSteps / kScales;
        UNROLL for (int group = 0; group < kScales; group++) {
            float product[4] = {};
            UNROLL for (int step = group * kStepsOfGroup; step < (group + 1) * kStepsOfGroup; step++)
                multiply_tile<T>(product, a[step], x[step]);
            add_group(tile, group, product, of_x[HasOffset ? group : 0], sums);
        }
    }
};

template <typename T, int Bits, int Group, bool HasOffset>
int start_quantised(const QuantisedLinearArgs& a) {
    const QuantisedWeight<T, Bits, Group, HasOffset> weight{static_cast<const uint8_t*>(a.panels), int(tiles_of(a.inputs))};
    const LinearRows rows{a.out,     a.x,          nullptr,      a.bias,      a.rows,            a.inputs,
                          a.outputs, a.row_stride, a.out_stride, a.out_dtype, a.is_deterministic};
    return start_linear("linear_quantised", rows, weight, a.stream);
}

template <typename T, int Bits, int Group>
int start_quantised(const QuantisedLinearArgs& a) {
    return a.has_offset ? start_quantised<T, Bits, Group, true>(a) : start_quantised<T, Bits, Group, false>(a);
}

// Of a format that exists.
template <typename T>
int start_quantised(const QuantisedLinearArgs& a) {
    if (a.bits == 4) return start_quantised<T, 4, 32>(a);
    return a.group == 32 ? start_quantised<T, 8, 32>(a) : start_quantised<T, 8, 16>(a);
}

// In a source each, to be compiled side by side.
int start_quantised_bf16(const QuantisedLinearArgs& a);
int start_quantised_fp16(const QuantisedLinearArgs& a);
