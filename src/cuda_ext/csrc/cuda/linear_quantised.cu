// The product of rows with a W4 or W8 matrix, of bfloat16 rows here.
#include "linear_quantised.h"

int start_quantised_bf16(const QuantisedLinearArgs& a) { return start_quantised<bf16>(a); }

extern "C" EXPORT int shoal_linear_quantised(const QuantisedLinearArgs* a) {
    const WeightFormat format{int(a->bits), int(a->group), a->has_offset != 0};
    if (!format.exists() || (a->out_dtype != kFloat32 && a->out_dtype != a->dtype)) return kNotSupported;
    switch (a->dtype) {
        case kBFloat16: return start_quantised_bf16(*a);
        case kFloat16: return start_quantised_fp16(*a);
        default: return kNotSupported;
    }
}
