// Compiled for AVX-512, VNNI and AMX where the compiler knows them; else there is nothing in it.
#include "linear_integers_amx.h"

#if defined(__AMX_BF16__)
#include "tile_panels.h"

namespace {

// Columns of the sums to rows of out.
struct RowsOut {
    static constexpr int64_t kPanels = 1;
    const QuantisedLinearArgs& a;

    INLINE void operator()(const TileSums& of) const {
        const int64_t output = of.panel * kPanel, n = min_of(kPanel, a.outputs - output);
        const Vec bias = a.bias ? load_n(a.bias + output, n) : Vec{};
        const auto put = [&](int64_t row, Vec sum) {
            store_n(a.out + row * a.out_stride + output, a.bias ? sum + bias : sum, n);
        };
        if (a.rows == 1) return put(0, load(of.sums[0][0]));
        for (int64_t tile = 0; tile < of.tiles; tile++) {
            const int64_t row = (of.tile + tile) * kTileRows;
            Vec v[kTileRows];
            for (int64_t k = 0; k < kPanel; k++) v[k] = load(of.sums[tile][k]);
            transpose(v);
            for (int64_t k = 0; k < min_of(kTileRows, a.rows - row); k++) put(row + k, v[k]);
        }
    }
};

int multiply(const float* x, int64_t row_stride, const QuantisedLinearArgs& a) {
    const int64_t bytes = WeightFormat{a.bits, a.group, a.has_offset != 0}.panel_bytes(a.inputs);
    const Panels panels{static_cast<const uint8_t*>(a.panels), nullptr, bytes, (a.outputs + kPanel - 1) / kPanel};
    return multiply_panels({x, static_cast<Narrow*>(a.x), panels, a.rows, a.inputs, row_stride, a.bits, a.group, a.has_offset},
                           RowsOut{a});
}

}  // namespace

int linear_integers_amx(const LinearArgs& a) {
    return multiply(a.x, a.row_stride, {a.out, nullptr, a.panels, a.bias, a.rows, a.inputs, a.outputs, a.out_stride, a.bits,
                                        a.group, a.has_offset});
}

int linear_narrow_amx(const QuantisedLinearArgs& a) { return multiply(nullptr, 0, a); }

#else

int linear_integers_amx(const LinearArgs&) { return kNoMemory; }

int linear_narrow_amx(const QuantisedLinearArgs&) { return kNoMemory; }

#endif
