// Causal attention over the paged cache for any mixture of prompt chunks and single tokens.
//
// Here: chunks. A block is some rows (tokens × the query heads of one KV head) of one sequence, and walks all sections of
// their context. Tiles of keys and values come by cp.async, one or two ahead of the tile that is multiplied; those of an
// fp8 cache are widened to half precision in shared memory. Chunks of many rows on sm_90a: attention_group.h. Single tokens:
// attention_split.h.
#include "attention_group.h"
#include "attention_split.h"

namespace {

// Of a block's shared memory: tiles as the cache has them, by stages; if that is fp8, a tile widened; queries; whole sums,
// which take the place of queries that registers keep.
template <typename Cache, int Dim, int Warps>
struct Layout {
    using T = ElementOf<Cache>;
    static constexpr bool kWidens = std::is_same_v<Cache, fp8>;
    static constexpr int kRawRow = Dim * int(sizeof(Cache)) + kPadBytes, kRow = Dim * 2 + kPadBytes;
    static constexpr int kRawTile = kTileKeys * kRawRow, kStage = 2 * kRawTile, kStages = Dim > 128 ? 2 : 3;
    static constexpr int kWide = kStages * kStage, kQueries = kWide + (kWidens ? 2 * kTileKeys * kRow : 0);
    static constexpr int kQueriesEnd = kQueries + Warps * kTileRows * kRow;
    static constexpr int kWhole = WarpQueries<T, Dim>::kAreKept ? kQueries : kQueriesEnd;
    static constexpr int kWholeEnd = kWhole + Warps * kTileRows * Dim * int(sizeof(float));
    static constexpr int kBytes = kQueriesEnd > kWholeEnd ? kQueriesEnd : kWholeEnd;
};

template <typename Cache, int Dim, int Warps>
struct AttentionBlock : BlockRows {
    using Places = Layout<Cache, Dim, Warps>;
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
            const unsigned char* from = shared + stage * Places::kStage + row * Places::kRawRow + column;
            const uint4 eight = widened_eight(load_whole<uint2>(from));
            store_whole(reinterpret_cast<T*>(shared + Places::kWide + row * Places::kRow) + column, eight);
        }
        __syncthreads();
    }

    __device__ __forceinline__ void walk(const WarpQueries<T, Dim>& q, WholeRows<T, Dim>& whole) const {
        constexpr int kStages = Places::kStages;
        const int first = seen_from / kTileKeys * kTileKeys, last = (seen_to + kTileKeys - 1) / kTileKeys * kTileKeys;
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
            rows.add_tile(q, widened(stage, 0), widened(stage, 1), int(a.dim), base, positions, how);
            if ((base + kTileKeys) % kSection == 0 || base + kTileKeys >= last) {
                whole.add(rows);
                rows.start_section();
            }
        }
    }
};

template <typename Cache, int Dim, int Warps>
__global__ void __launch_bounds__(Warps* kWarpSize, 1) paged_attention_kernel(AttentionArgs a, bool aligned) {
    begin_kernel();
    Span span;
    if (!find_span<Warps>(a, span)) return;
    using Block = AttentionBlock<Cache, Dim, Warps>;
    const Block block{{a, span}, dynamic_shared()};
    const auto queries = block.queries(aligned);
    const int warp = int(threadIdx.x) / kWarpSize;
    const int place = Block::Places::kWhole + warp * kTileRows * Dim * int(sizeof(float));
    WholeRows<typename Block::T, Dim> whole{reinterpret_cast<float*>(dynamic_shared() + place), {}};
    whole.start();
    block.walk(queries, whole);
    block.store(whole);
}

bool has_aligned_queries(const AttentionArgs& a) {
    return is_aligned<bf16>(a.q, a.q_token_stride) && a.q_head_stride % 8 == 0;
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
    constexpr size_t kBytes = size_t(Layout<Cache, Dim, Warps>::kBytes);
    if constexpr (Warps > (Dim > 128 ? 1 : 4)) {
        const bool fits = kBytes <= chip().shared_bytes;
        if (!fits || tiles * a.kv_heads < chip().processors) return start_chunks<Cache, Dim, Warps / 2>(a);
    }
    const dim3 grid(unsigned(tiles), unsigned(a.kv_heads));
    const auto kernel = paged_attention_kernel<Cache, Dim, Warps>;
    return launch("paged_attention", kernel, grid, Warps * kWarpSize, kBytes, a.stream, a, has_aligned_queries(a));
}

SplitSizes split_sizes(const AttentionArgs& a) {
    const auto group = unsigned(a.heads / a.kv_heads);
    int shift = 0;
    while (int64_t(1) << shift < a.block_size) shift++;
    if (int64_t(1) << shift != a.block_size) shift = -1;
    return {group, (group + kTileRows - 1) / kTileRows, shift, has_aligned_queries(a)};
}

// Many blocks are fewer with more sections each. More warps where there are processors for a block each.
template <typename Cache, int Dim, int Warps>
int start_split(const AttentionArgs& a, const SplitSizes& sizes, int64_t sections) {
    constexpr size_t kBytes = sizeof(SplitShared<Cache, Dim, Warps>);
    const int64_t tiles = sizes.tiles * a.kv_heads * a.sequences;
    if constexpr (Warps > 4) {
        const bool fits = kBytes <= chip().shared_bytes;
        if (!fits || sections * tiles > chip().processors) return start_split<Cache, Dim, Warps / 2>(a, sizes, sections);
    }
    const int64_t blocks = int64_t(kSplitTurns) * kSplitBlocks<Cache, Dim, Warps> * chip().processors / tiles;
    const int64_t most = blocks > 1 ? blocks : 1;
    const dim3 grid(unsigned(tiles / a.sequences), unsigned(a.sequences), unsigned(sections < most ? sections : most));
    const auto kernel = paged_attention_split_kernel<Cache, Dim, Warps>;
    return launch("paged_attention", kernel, grid, Warps * kWarpSize, kBytes, a.stream, a, sizes);
}

template <typename Cache, int Dim>
int start(const AttentionArgs& a) {
    if (a.most_tokens > 1)
        if (const int status = start_chunks<Cache, Dim, (Dim > 128 ? 2 : 8)>(a)) return status;
    // Where no sequence can have a single token, there is nothing more to do.
    if (a.sequences == 0 || a.tokens > 1 + (a.sequences - 1) * a.most_tokens) return kOk;
    const int64_t all = sections_of(a.most_context), seen = (a.window + kSection - 2) / kSection + 1;
    return start_split<Cache, Dim, 8>(a, split_sizes(a), a.window > 0 && seen < all ? seen : all);
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
    if (a->blocks * a->kv_heads * a->block_size * (a->dim * bytes / 16) >= kNowhere) return kNotSupported;
    if (a->workspace_floats < a->sequences * a->heads * (sections_of(a->most_context) * (a->dim + 2) + 1)) return kNoMemory;
    switch (a->cache_dtype) {
        case kBFloat16: return start<bf16>(*a);
        case kFloat16: return start<fp16>(*a);
        case kFloat8: return start<fp8>(*a);
        default: return kNotSupported;
    }
}
