// Rows of the embedding matrix, gathered and scaled; ids that this rank does not hold give zeros. A thread
// does eight elements; of a quantised matrix a block a token.
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
    const bool is_held = row >= 0 && row < a.rows;
    const int64_t tile_bytes = format.tile_bytes();
    const auto* panel = static_cast<const uint8_t*>(a.table) + row / kTileOutputs * tiles_of(a.dim) * tile_bytes;
    for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
        const uint8_t* tile = panel + i / kTileInputs * tile_bytes;
        const float weight = is_held ? weight_at(tile, format, int(row % kTileOutputs), int(i % kTileInputs)) : 0.0f;
        a.out[token * a.dim + i] = weight * float(a.scale);
    }
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
    return launch("embed", embed_quantised_kernel, dim3(unsigned(a->tokens)), kThreads, 0, a->stream, *a, format);
}
