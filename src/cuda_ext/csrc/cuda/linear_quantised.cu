// The product of rows with a W4 or W8 matrix, of bfloat16 rows here. For many rows cuBLAS has it dequantised, piece by
// piece.
#include "library_product.h"
#include "linear_quantised.h"

int start_quantised_bf16(const QuantisedLinearArgs& a) { return start_quantised<bf16>(a); }

extern "C" int shoal_dequantise(const DequantiseArgs* a);

static int start_pieces(const QuantisedLinearArgs& a, const WeightFormat& format) {
    const int64_t panel_bytes = tiles_of(a.inputs) * format.tile_bytes();
    return multiply_by_pieces(product_of(a), [&](int64_t first, int64_t count, void* to) {
        const void* panels = static_cast<const uint8_t*>(a.panels) + first / kTileOutputs * panel_bytes;
        const DequantiseArgs piece{to,      panels,       count,   a.inputs, a.bits,
                                   a.group, a.has_offset, a.dtype, a.stream};
        return shoal_dequantise(&piece);
    });
}

extern "C" EXPORT int shoal_linear_quantised(const QuantisedLinearArgs* a) {
    const WeightFormat format{int(a->bits), int(a->group), a->has_offset != 0};
    if (!format.exists() || (a->out_dtype != kFloat32 && a->out_dtype != a->dtype)) return kNotSupported;
    if (takes_pieces(a->rows, a->inputs, a->is_deterministic)) return start_pieces(*a, format);
    switch (a->dtype) {
        case kBFloat16: return start_quantised_bf16(*a);
        case kFloat16: return start_quantised_fp16(*a);
        default: return kNotSupported;
    }
}
