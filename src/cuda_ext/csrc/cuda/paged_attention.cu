// Causal attention over the paged cache for any mixture of prompt chunks and single tokens.
//
// A block is some rows (tokens × the query heads of one KV head) of one sequence. Chunks: a block walks all sections of
// its rows' context. Single tokens: a section is a block of its own (flash decoding), which leaves its sums in the
// workspace, and a second kernel puts them together. Tiles of keys and values come by cp.async, one or two ahead of the
// tile that is multiplied; those of an fp8 cache are widened to bfloat16 in shared memory. Chunks of many rows on sm_90a:
// attention_group.h.
#include "attention_group.h"

namespace {

// Of a block's shared memory: tiles as the cache has them, by stages; if that is fp8, a tile widened; queries; whole sums,
// which take the place of queries that registers keep.
template <typename Cache, int Dim, int Warps, bool IsSplit>
struct Layout {
    using T = ElementOf<Cache>;
    static constexpr bool kWidens = std::is_same_v<Cache, fp8>;
    static constexpr int kRawRow = Dim * int(sizeof(Cache)) + kPadBytes, kRow = Dim * 2 + kPadBytes;
    static constexpr int kRawTile = kTileKeys * kRawRow, kStage = 2 * kRawTile, kStages = Dim > 128 ? 2 : 3;
    static constexpr int kWide = kStages * kStage, kQueries = kWide + (kWidens ? 2 * kTileKeys * kRow : 0);
    static constexpr int kQueriesEnd = kQueries + Warps * kTileRows * kRow;
    static constexpr int kWhole = WarpQueries<T, Dim>::kAreKept ? kQueries : kQueriesEnd;
    static constexpr int kWholeEnd = kWhole + (IsSplit ? 0 : Warps * kTileRows * Dim * int(sizeof(float)));
    static constexpr int kBytes = kQueriesEnd > kWholeEnd ? kQueriesEnd : kWholeEnd;
};

template <typename Cache, int Dim, int Warps, bool IsSplit>
struct AttentionBlock : BlockRows {
    using Places = Layout<Cache, Dim, Warps, IsSplit>;
    using T = ElementOf<Cache>;
    static constexpr int kThreads = Warps * kWarpSize;
    static constexpr int kAtOnce = Dim > 128 ? 1 : 4;  // turns of a loop that are unrolled: wide heads need the registers

    unsigned char* shared;

    // Afterwards whole sums may begin.
    __device__ __forceinline__ WarpQueries<T, Dim> queries(bool aligned) const {
        T* all = reinterpret_cast<T*>(shared + Places::kQueries);
        load_queries<T, Dim, Warps * kTileRows, kThreads>(all, aligned);
        WarpQueries<T, Dim> mine;
        mine.rows = {all + int(threadIdx.x) / kWarpSize * kTileRows * SharedRows<T, Dim>::kStride};
        __syncthreads();
        mine.keep();
        __syncthreads();
        return mine;
    }

    // Asks for the keys and values of the tile at ``first``, which is nothing at ``last``: one group of copies a tile.
    // Positions that no row sees and columns beyond dim are zeros.
    __device__ __forceinline__ void fetch(int first, int last, int stage) const {
        if (first >= last) return commit_copies();
        constexpr int kOfChunk = 16 / int(sizeof(Cache)), kChunks = Dim / kOfChunk;
        UNROLL_SOME for (int i = int(threadIdx.x); i < kTileKeys * kChunks; i += kThreads) {
            const int key = i / kChunks, column = i % kChunks * kOfChunk;
            const int64_t row = column < a.dim ? cache_row(first + key) : -1, place = row < 0 ? 0 : row * a.dim + column;
            unsigned char* into = shared + stage * Places::kStage + key * Places::kRawRow + column * int(sizeof(Cache));
            copy_16_bytes(into, static_cast<const Cache*>(a.k_cache) + place, row >= 0);
            copy_16_bytes(into + Places::kRawTile, static_cast<const Cache*>(a.v_cache) + place, row >= 0);
        }
        commit_copies();
    }

    // Keys as what is multiplied; values lie a tile behind them.
    __device__ __forceinline__ SharedRows<T, Dim> widened(int stage, int values) const {
        if constexpr (!Places::kWidens)
            return {reinterpret_cast<T*>(shared + stage * Places::kStage + values * Places::kRawTile)};
        else
            return {reinterpret_cast<T*>(shared + Places::kWide + values * kTileKeys * Places::kRow)};
    }

    __device__ __forceinline__ void widen(int stage) const {
        UNROLL_SOME for (int i = int(threadIdx.x); i < 2 * kTileKeys * Dim / 8; i += kThreads) {
            const int row = i / (Dim / 8), column = i % (Dim / 8) * 8;
            float eight[8];
            const unsigned char* from = shared + stage * Places::kStage + row * Places::kRawRow;
            load_eight(eight, reinterpret_cast<const Cache*>(from) + column, 8, true);
            store_eight(reinterpret_cast<T*>(shared + Places::kWide + row * Places::kRow) + column, eight, 8, true);
        }
        __syncthreads();
    }

    // The tiles from ``first`` to ``last``, multiples of a tile; finish(section) after each section's last one.
    template <typename Finish>
    __device__ __forceinline__ void walk(const WarpQueries<T, Dim>& q, int first, int last, const Finish& finish) const {
        constexpr int kStages = Places::kStages;
        int positions[2];
        lane_positions(positions);
        const Scores how = scores();
        WarpRows<T, Dim> rows;
        rows.start_section();
        for (int stage = 0; stage + 1 < kStages; stage++) fetch(first + stage * kTileKeys, last, stage);
        KEEP_LOOP for (int base = first, stage = 0; base < last; base += kTileKeys, stage = (stage + 1) % kStages) {
            wait_for_copies<kStages - 2>();
            __syncthreads();
            // Into the place of the tile before, which all have done.
            fetch(base + (kStages - 1) * kTileKeys, last, (stage + kStages - 1) % kStages);
            if constexpr (Places::kWidens) widen(stage);
            rows.add_tile(q, widened(stage, 0), widened(stage, 1), base, positions, how);
            if ((base + kTileKeys) % kSection == 0 || base + kTileKeys >= last) {
                rows.finish_section();
                finish(rows);
                rows.start_section();
            }
        }
    }
};

template <typename Cache, int Dim, int Warps, bool IsSplit>
__global__ void __launch_bounds__(Warps* kWarpSize, 1) paged_attention_kernel(AttentionArgs a, bool aligned) {
    Span span;
    if (!find_span<Warps, IsSplit>(a, span)) return;
    using Block = AttentionBlock<Cache, Dim, Warps, IsSplit>;
    const Block block{{a, span}, dynamic_shared()};
    const int warp = int(threadIdx.x) / kWarpSize;
    const int from = block.seen_from / kTileKeys * kTileKeys;
    const int to = (block.seen_to + kTileKeys - 1) / kTileKeys * kTileKeys;
    const int section_first = IsSplit ? int(blockIdx.x) * kSection : 0;
    const int first = from > section_first ? from : section_first;
    const int last = IsSplit && to > section_first + kSection ? section_first + kSection : to;
    if (IsSplit && first >= last) return;

    const auto queries = block.queries(aligned);
    // A single section's sums take the place of the tiles that came to them.
    const int place = IsSplit ? 0 : Block::Places::kWhole + warp * kTileRows * Dim * int(sizeof(float));
    WholeRows<typename Block::T, Dim> whole{reinterpret_cast<float*>(dynamic_shared() + place), {}};
    if (!IsSplit) whole.start();
    block.walk(queries, first, last, [&](const auto& rows) {
        if (IsSplit) whole.start();
        whole.add(rows);
    });
    block.template store<IsSplit>(whole);
}

constexpr int kMergeThreads = 128;

// A block a head of a single token.
__global__ void __launch_bounds__(kMergeThreads) merge_sections_kernel(AttentionArgs a) {
    const int head = int(blockIdx.x), sequence = int(blockIdx.y), token = a.query_starts[sequence];
    const int context = a.context_lens[sequence];
    const float v_scale = scale_of(a.v_scales, head / (a.heads / a.kv_heads));
    if (a.query_starts[sequence + 1] - token != 1 || context < 1 || context > a.most_context ||
        context > a.table_width * a.block_size)
        return;
    const int unseen = a.window > 0 && context > a.window ? context - int(a.window) : 0;
    for (int column = int(threadIdx.x); column < a.dim; column += kMergeThreads) {
        Softmax whole = {-INFINITY, 0.0f};
        float sum = 0.0f;
        for (int section = unseen / kSection; section < sections_of(context); section++) {
            const float* part = part_of(a, sequence, head, section);
            const Weights w = put_together(whole, {part[a.dim], part[a.dim + 1]});
            sum = fmaf(part[column], w.take, sum * w.keep);
        }
        store_out(a, (int64_t(token) * a.heads + head) * a.dim + column, sum / whole.total * v_scale);
    }
}

bool has_aligned_queries(const AttentionArgs& a) {
    return is_aligned<bf16>(a.q, a.q_token_stride) && a.q_head_stride % 8 == 0;
}

template <typename Cache, int Dim, int Warps, bool IsSplit>
int start_blocks(const AttentionArgs& a, dim3 grid) {
    constexpr int kBytes = Layout<Cache, Dim, Warps, IsSplit>::kBytes;
    const auto kernel = paged_attention_kernel<Cache, Dim, Warps, IsSplit>;
    return launch("paged_attention", kernel, grid, Warps * kWarpSize, kBytes, a.stream, a, has_aligned_queries(a));
}

// How many blocks of so many rows all chunks of a KV head may take.
int64_t most_tiles(const AttentionArgs& a, int rows) {
    const int64_t chunks = a.sequences < a.tokens / 2 ? a.sequences : a.tokens / 2;
    return a.tokens * (a.heads / a.kv_heads) / rows + chunks;
}

// One warpgroup a block where all of those have a processor of their own.
template <typename Cache, int Dim, int Groups>
int start_groups(const AttentionArgs& a) {
    if constexpr (Groups > 1)
        if (most_tiles(a, kGroupRows) * a.kv_heads <= chip().processors) return start_groups<Cache, Dim, Groups / 2>(a);
    const int64_t spans = most_tiles(a, Groups * kGroupRows) * a.kv_heads, processors = chip().processors;
    const dim3 grid(unsigned(spans < processors ? spans : processors));
    constexpr size_t kBytes = sizeof(AttentionShared<Cache, Dim, Groups>);
    const auto kernel = paged_attention_group_kernel<Cache, Dim, Groups>;
    return launch("paged_attention", kernel, grid, kGroupThreads<Groups>, kBytes, a.stream, a, has_aligned_queries(a),
                  is_aligned<bf16>(a.out, a.dim));
}

// Smaller blocks where large ones take more memory than the chip has for one, or leave processors without one.
template <typename Cache, int Dim, int Warps>
int start_chunks(const AttentionArgs& a) {
    const bool has_rows = a.most_tokens * (a.heads / a.kv_heads) >= kGroupRows;
    if (has_rows && has_wgmma() && !a.is_deterministic && a.scale > 0) return start_groups<Cache, Dim, 2>(a);
    const int64_t tiles = most_tiles(a, Warps * kTileRows);
    if constexpr (Warps > (Dim > 128 ? 1 : 4)) {
        const bool fits = size_t(Layout<Cache, Dim, Warps, false>::kBytes) <= chip().shared_bytes;
        if (!fits || tiles * a.kv_heads < chip().processors) return start_chunks<Cache, Dim, Warps / 2>(a);
    }
    return start_blocks<Cache, Dim, Warps, false>(a, dim3(unsigned(tiles), unsigned(a.kv_heads)));
}

template <typename Cache, int Dim>
int start(const AttentionArgs& a) {
    const int64_t group = a.heads / a.kv_heads;
    if (a.most_tokens > 1)
        if (const int status = start_chunks<Cache, Dim, (Dim > 128 ? 2 : 8)>(a)) return status;
    if (a.tokens > 1 + (a.sequences - 1) * a.most_tokens) return kOk;  // no sequence can have a single token
    const int64_t sections = (a.most_context + kSection - 1) / kSection;
    const int64_t tiles = (group + kTileRows - 1) / kTileRows * a.kv_heads;
    const dim3 grid(unsigned(sections), unsigned(tiles), unsigned(a.sequences));
    if (const int status = start_blocks<Cache, Dim, 1, true>(a, grid)) return status;
    const dim3 merges(unsigned(a.heads), unsigned(a.sequences));
    return launch("paged_attention", merge_sections_kernel, merges, kMergeThreads, 0, a.stream, a);
}

template <typename Cache>
int start(const AttentionArgs& a) {
    if (a.dim <= 64) return start<Cache, 64>(a);
    return a.dim <= 128 ? start<Cache, 128>(a) : start<Cache, 256>(a);
}

}  // namespace

extern "C" EXPORT int shoal_paged_attention(const AttentionArgs* a) {
    const int64_t bytes = a->cache_dtype == kFloat8 ? 1 : 2;
    if (a->dim > 256 || a->dim * bytes % 16 || a->heads % a->kv_heads) return kNotSupported;
    const int64_t sections = (a->most_context + kSection - 1) / kSection;
    if (a->workspace_floats < a->sequences * a->heads * sections * (a->dim + 2)) return kNoMemory;
    switch (a->cache_dtype) {
        case kBFloat16: return start<bf16>(*a);
        case kFloat16: return start<fp16>(*a);
        case kFloat8: return start<fp8>(*a);
        default: return kNotSupported;
    }
}
