// Integer weights (quantised.h) as tiles take them: 16 outputs, each with 32 inputs in bfloat16, the nearest to
// scale · (code − zero) + offset; of two W4 takes the larger one, W8 the even one.
#pragma once

#include "quantised.h"
#include "tiles.h"
#include "vec.h"

namespace {

constexpr int64_t kTileWords = kStrip * kTileRows;

// To bfloat16 in the upper half of each lane; of two that are as near the one away from zero.
INLINE __m512i rounded(Vec x) { return _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000)); }

template <int Bits, int Group, bool HasOffset>
struct TileBlock {
    static constexpr WeightFormat kFormat{Bits, Group, HasOffset};
    static constexpr int64_t kBlocks = kStrip / Group, kBytes = kBlocks * kFormat.block_bytes();
    // W8 codes become floats from 1 to 2: 1 + code / 2^15, in units of which they are kFirst + code.
    static constexpr float kFirst = Bits == 8 ? 32768.0f : 0.0f, kUnit = Bits == 8 ? 32768.0f : 1.0f;
    static constexpr int64_t kCodeBytes = kFormat.lines() * kLine;

    // Of a strip's blocks: a weight is scale · (kFirst + code) + start, and for W8 the offset on top; all but the last sum
    // are exact. They are read one by one, and so made some time before: a part of what was just stored is slow to come.
    struct Factors {
        alignas(64) float scale[kBlocks][kPanel];
        alignas(64) float start[kBlocks][kPanel];
        alignas(64) float offset[Bits == 8 && HasOffset ? kBlocks : 0][kPanel];

        INLINE void read(const uint8_t* strip) {
            for (int64_t i = 0; i < kBlocks; i++) {
                const uint8_t* scales = strip + i * kFormat.block_bytes() + kCodeBytes;
                const Vec of = load_half_precision(scales);
                Vec from = of * broadcast(-kFirst - float(kFormat.zero()));
                if constexpr (HasOffset && Bits == 8) store(offset[i], load_half_precision(scales + 32));
                if constexpr (HasOffset && Bits == 4) from = load_half_precision(scales + 32);
                store(scale[i], of * broadcast(kUnit));
                store(start[i], from);
            }
        }
    };

    // The 16 values that an output's code may have are looked up by its 32 inputs' places: 2 · code + 1, for the upper half of
    // a float; bits above those five are not looked at.
    static INLINE void look_up(__m512i places, const Factors& factors, int64_t output, Narrow* to) {
        const Vec codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const Vec values = fused(codes, broadcast(factors.scale[0][output]), broadcast(factors.start[0][output]));
        _mm512_store_si512(to + output * kStrip, _mm512_permutexvar_epi16(places, rounded(values)));
    }

    static INLINE void unpack_small(const uint8_t* block, const Factors& factors, Narrow* to) {
#pragma GCC unroll 4
        for (int64_t output = 0; output < kPanel; output += 4) {
            const __m512i codes = _mm512_loadu_si512(block + output / 4 * kLine);
            const __m512i before_odd = _mm512_or_si512(codes, _mm512_set1_epi16(0x0808));
            const __m512i before_even = _mm512_or_si512(codes, _mm512_set1_epi16(0x0080));
            look_up(_mm512_shldi_epi16(codes, _mm512_set1_epi16(-1), 1), factors, output, to);
            look_up(_mm512_srli_epi16(before_odd, 3), factors, output + 1, to);
            look_up(_mm512_srli_epi16(before_even, 7), factors, output + 2, to);
            look_up(_mm512_srli_epi16(before_odd, 11), factors, output + 3, to);
        }
    }

    // Of 16 inputs of an output.
    static INLINE __m512 weights_of(const uint8_t* codes, const Factors& factors, int64_t block, int64_t output) {
        const __m512i four_times = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m512i byte_of_each = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 8);
        const __m512i one = _mm512_set1_epi32(0x3f800000);
        const __m512i fraction = _mm512_mask_shuffle_epi8(one, 0x2222222222222222, four_times, byte_of_each);
        const Vec weights = fused((Vec)fraction, broadcast(factors.scale[block][output]), broadcast(factors.start[block][output]));
        if constexpr (HasOffset) return (__m512)(weights + broadcast(factors.offset[block][output]));
        return (__m512)weights;
    }

    static INLINE void unpack_wide(const uint8_t* block, const Factors& factors, Narrow* to) {
        const uint8_t* second = kBlocks == 2 ? block + kFormat.block_bytes() : block + 16;
#pragma GCC unroll 4
        for (int64_t i = 0; i < kPanel; i++) {
            const __m512 low = weights_of(block + i * Group, factors, 0, i);
            const __m512 high = weights_of(second + i * Group, factors, kBlocks - 1, i);
            _mm512_store_si512(to + i * kStrip, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }

    static INLINE void fetch(const uint8_t* strip) {
        for (int64_t at = 0; at < kBytes; at += kLine) __builtin_prefetch(strip + at);
    }

    static INLINE void unpack(const uint8_t* strip, const Factors& factors, Narrow* to) {
        if constexpr (Bits == 4)
            unpack_small(strip, factors, to);
        else
            unpack_wide(strip, factors, to);
    }
};

}  // namespace
