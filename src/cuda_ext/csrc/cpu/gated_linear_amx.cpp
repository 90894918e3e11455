// Compiled for AVX-512, VNNI and AMX where the compiler knows them; else there is nothing in it.
#include "gated_linear_amx.h"

#if defined(__AMX_BF16__)
#include "activate_narrow.h"
#include "tile_panels.h"

namespace {

// A line of sums has an output's rows, as two outputs' side by side are what the next product takes.
template <Vec (*Activate)(Vec)>
struct NarrowOut {
    static constexpr int64_t kPanels = 2;
    const GatedLinearArgs& a;
    NarrowRows out;

    INLINE void operator()(const TileSums& of) const {
        const int64_t output = of.panel / 2 * kPanel;
        Narrow* to = out.tile(of.tile) + output / kStrip * kTileWords;
        if (a.rows == 1) {
            Vec gate = load(of.sums[0][0]), up = load(of.sums[1][0]);
            if (a.gate_bias) gate = gate + load(a.gate_bias + output);
            if (a.up_bias) up = up + load(a.up_bias + output);
            const Vec y = Activate(gate) * up;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + output % kStrip), (__m256i)_mm512_cvtneps_pbh((__m512)y));
            return;
        }
        for (int64_t tile = 0; tile < of.tiles; tile++, to += out.strips * kTileWords)
            for (int64_t k = 0; k < kPanel; k += 2) {
                const Vec low = value(of, tile, output, k), high = value(of, tile, output, k + 1);
                _mm512_store_si512(to + (output % kStrip + k) * kTileRows, side_by_side(low, high));
            }
    }

    // Of an output, for the rows of a tile.
    INLINE Vec value(const TileSums& of, int64_t tile, int64_t output, int64_t k) const {
        Vec gate = load(of.sums[tile][k]), up = load(of.sums[of.tiles + tile][k]);
        if (a.gate_bias) gate = gate + broadcast(a.gate_bias[output + k]);
        if (a.up_bias) up = up + broadcast(a.up_bias[output + k]);
        return Activate(gate) * up;
    }

    static INLINE __m512i side_by_side(Vec low, Vec high) {
        const __m512i lows = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
        const __m512i highs = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
        return _mm512_or_si512(lows, _mm512_slli_epi32(highs, 16));
    }
};

template <Vec (*Activate)(Vec)>
int multiply(const GatedLinearArgs& a) {
    const int64_t bytes = WeightFormat{a.bits, a.group, a.has_offset != 0}.panel_bytes(a.inputs);
    const Panels panels{static_cast<const uint8_t*>(a.gate), static_cast<const uint8_t*>(a.up), bytes, a.outputs / kPanel * 2};
    const NarrowRows out{static_cast<Narrow*>(a.out), strips_of(a.outputs)};
    return multiply_panels({a.x, nullptr, panels, a.rows, a.inputs, a.row_stride, a.bits, a.group, a.has_offset},
                           NarrowOut<Activate>{a, out});
}

}  // namespace

int gated_linear_amx(const GatedLinearArgs& a) {
    return a.kind == kSilu ? multiply<narrow_silu>(a) : multiply<narrow_gelu_tanh>(a);
}

#else

int gated_linear_amx(const GatedLinearArgs&) { return kNoMemory; }

#endif
