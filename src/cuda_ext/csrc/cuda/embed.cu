// Rows of the embedding matrix, gathered and scaled; ids that this rank does not hold give zeros. A thread does eight
// elements, of a quantised matrix one.
#include "launch.h"
#include "quantised.h"

namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) embed_kernel(EmbedArgs a, bool aligned) {
    begin_kernel();
    const int64_t token = blockIdx.x, row = a.ids[token] - a.first_id;
    const int i = int(blockIdx.y * kThreads + threadIdx.x) * 8, left = int(a.dim) - i, count = left < 8 ? left : 8;
    if (count <= 0) return;
    float eight[8] = {};
    if (row >= 0 && row < a.rows) load_eight(eight, static_cast<const T*>(a.table) + row * a.dim + i, count, aligned);
    UNROLL for (float& e : eight) e *= float(a.scale);
    store_eight(a.out + token * a.dim + i, eight, count, aligned);
}

__global__ void __launch_bounds__(kThreads) embed_quantised_kernel(EmbedArgs a, WeightFormat format) {
    begin_kernel();
    const int64_t token = blockIdx.x, row = a.ids[token] - a.first_id;
    const int i = int(blockIdx.y * kThreads + threadIdx.x);
    if (i >= a.dim) return;
    float weight = 0.0f;
    if (row >= 0 && row < a.rows) {
        const int64_t panel = row / kTileOutputs * tiles_of(a.dim);
        const uint8_t* tile = static_cast<const uint8_t*>(a.table) + (panel + i / kTileInputs) * format.tile_bytes();
        weight = weight_at(tile, format, int(row % kTileOutputs), i % kTileInputs);
    }
    a.out[token * a.dim + i] = weight * float(a.scale);
}

template <typename T>
int start(const EmbedArgs& a) {
    const bool aligned = is_aligned<T>(a.table, a.dim) && is_aligned<float>(a.out, a.dim);
    const dim3 grid(unsigned(a.tokens), unsigned((a.dim + kThreads * 8 - 1) / (kThreads * 8)));
    return launch("embed", embed_kernel<T>, grid, kThreads, 0, a.stream, a, aligned);
}

}  // namespace

extern "C" EXPORT int shoal_embed(const EmbedArgs* a) {
    if (!a->bits) return a->dtype == kBFloat16 ? start<bf16>(*a) : start<fp16>(*a);
    const WeightFormat format{int(a->bits), int(a->group), a->has_offset != 0};
    if (!format.exists()) return kNotSupported;
    const dim3 grid(unsigned(a->tokens), unsigned((a->dim + kThreads - 1) / kThreads));
    return launch("embed", embed_quantised_kernel, grid, kThreads, 0, a->stream, *a, format);
}
