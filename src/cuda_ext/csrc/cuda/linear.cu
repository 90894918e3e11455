// The product with a plain matrix of bfloat16 or half precision: by cuBLAS, but for few rows of a small one.
#include "library_product.h"
#include "linear_matrix.h"

namespace {

template <typename T>
struct PlainWeight : MatrixWeight<T, uint16_t> {
    using typename MatrixWeight<T, uint16_t>::Tile;
    static constexpr int kAhead[2] = {2, 1}, kPanels = 2;

    __device__ __forceinline__ void widen(const Tile& tile, uint32_t (&a)[kSteps][4]) const {
        UNROLL for (int step = 0; step < kSteps; step++)
            UNROLL for (int i = 0; i < 4; i++) a[step][i] = tile.words[step / 2][i % 2][step % 2 * 2 + i / 2];
    }
};

// For up to so many rows and a matrix of up to so many weights the kernel here is no slower.
constexpr int64_t kOwnRows = 8, kOwnWeights = 2 << 20;

}  // namespace

extern "C" EXPORT int shoal_linear(const LinearArgs* a) {
    if (a->out_dtype != kFloat32 && a->out_dtype != a->dtype) return kNotSupported;
    if (a->weight_dtype == kFloat8) return start_linear_fp8(*a);
    if (a->weight_dtype != a->dtype || a->scales) return kNotSupported;
    const bool is_small = a->rows == 0 || (a->rows <= kOwnRows && a->outputs * a->inputs <= kOwnWeights);
    if (!is_small && !a->is_deterministic && has_product_library()) {
        LibraryProduct product = product_of(*a);
        product.weight = a->weight, product.weight_stride = a->weight_stride;
        return multiply_by_library(product);
    }
    return a->dtype == kBFloat16 ? start_matrix<PlainWeight<bf16>>(*a) : start_matrix<PlainWeight<fp16>>(*a);
}
