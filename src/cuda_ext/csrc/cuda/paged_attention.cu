// Causal attention over the paged cache for any mixture of prompt chunks and single tokens.
//
// A block is some rows (tokens × the query heads of one KV head) of one sequence. Chunks: a block walks all sections of
// its rows' context. Single tokens: a section is a block of its own (flash decoding), which leaves its sums in the
// workspace, and a second kernel puts them together. Tiles of keys and values come by cp.async, one or two ahead of the
// tile that is multiplied; those of an fp8 cache are widened to bfloat16 in shared memory.
#include "attention_tile.h"

namespace {

template <typename Cache>
using ElementOf = std::conditional_t<std::is_same_v<Cache, fp8>, bf16, Cache>;

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

// The rows of a block: ``rows`` of them from the first of its sequence's.
struct Span {
    int sequence, first_token, tokens, context, first_row, rows, kv_head;
};

// The sequence of the index-th tile of ``tile_rows`` rows, counting through those of several tokens. All lanes alike.
__device__ bool find_tile(const AttentionArgs& a, int index, int tile_rows, Span& span) {
    const int lane = int(threadIdx.x) % kWarpSize, group = int(a.heads / a.kv_heads);
    for (int base = 0; base < a.sequences; base += kWarpSize) {
        const int sequence = base + lane;
        const int tokens = sequence < a.sequences ? a.query_starts[sequence + 1] - a.query_starts[sequence] : 0;
        const int tiles = tokens > 1 ? (tokens * group + tile_rows - 1) / tile_rows : 0;
        int end = tiles;
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const int before = __shfl_up_sync(kAllLanes, end, distance);
            if (lane >= distance) end += before;
        }
        const uint32_t beyond = __ballot_sync(kAllLanes, end > index);
        if (beyond) {
            const int found = __ffs(beyond) - 1;
            span.sequence = base + found;
            span.tokens = __shfl_sync(kAllLanes, tokens, found);
            span.first_row = (index - __shfl_sync(kAllLanes, end - tiles, found)) * tile_rows;
            return true;
        }
        index -= __shfl_sync(kAllLanes, end, kWarpSize - 1);
    }
    return false;
}

// Of a chunk's tile or of a single token; false where the block has nothing to do.
template <int Warps, bool IsSplit>
__device__ bool find_span(const AttentionArgs& a, Span& span) {
    const int group = int(a.heads / a.kv_heads), tile_rows = Warps * kTileRows;
    if (IsSplit) {
        const int tiles = (group + tile_rows - 1) / tile_rows;
        span.sequence = int(blockIdx.z);
        span.tokens = a.query_starts[span.sequence + 1] - a.query_starts[span.sequence];
        span.kv_head = int(blockIdx.y) / tiles;
        span.first_row = int(blockIdx.y) % tiles * tile_rows;
        if (span.tokens != 1) return false;
    } else {
        span.kv_head = int(blockIdx.y);
        if (!find_tile(a, int(blockIdx.x), tile_rows, span)) return false;
    }
    const int left = span.tokens * group - span.first_row;
    span.rows = left < tile_rows ? left : tile_rows;
    span.first_token = a.query_starts[span.sequence];
    span.context = a.context_lens[span.sequence];
    const bool fits = span.context >= span.tokens && span.context <= a.table_width * a.block_size &&
                      span.context <= a.most_context;
    if (!fits && threadIdx.x == 0) atomicCAS(a.fault, kOk, kContextTooShort);
    return fits;
}

template <typename Cache, int Dim, int Warps, bool IsSplit>
struct AttentionBlock {
    using Places = Layout<Cache, Dim, Warps, IsSplit>;
    using T = ElementOf<Cache>;
    static constexpr int kThreads = Warps * kWarpSize;
    static constexpr int kAtOnce = Dim > 128 ? 1 : 4;  // turns of a loop that are unrolled: wide heads need the registers

    const AttentionArgs& a;
    const Span& span;
    unsigned char* shared;
    int group = int(a.heads / a.kv_heads);
    int first_position = span.context - span.tokens;

    __device__ __forceinline__ int position_of(int row) const { return first_position + (span.first_row + row) / group; }
    __device__ __forceinline__ int head_of(int row) const { return span.kv_head * group + (span.first_row + row) % group; }
    __device__ __forceinline__ int token_of(int row) const { return span.first_token + (span.first_row + row) / group; }

    // The first position that any row sees, and the one behind the last.
    __device__ __forceinline__ int seen_from() const {
        const int first = position_of(0) + 1 - int(a.window);
        return a.window > 0 && first > 0 ? first : 0;
    }
    __device__ __forceinline__ int seen_to() const { return position_of(span.rows - 1) + 1; }

    template <typename Q>
    __device__ __forceinline__ void load_queries(bool aligned) const {
        KEEP_LOOP for (int i = int(threadIdx.x); i < Warps * kTileRows * Dim / 8; i += kThreads) {
            const int row = i / (Dim / 8), column = i % (Dim / 8) * 8;
            const Q* q = static_cast<const Q*>(a.q) + token_of(row) * a.q_token_stride + head_of(row) * a.q_head_stride;
            float eight[8] = {};
            if (row < span.rows && column < a.dim) load_eight(eight, q + column, 8, aligned);
            auto* to = reinterpret_cast<T*>(shared + Places::kQueries + row * Places::kRow) + column;
            store_eight(to, eight, 8, true);
        }
    }

    // Afterwards whole sums may begin.
    __device__ __forceinline__ WarpQueries<T, Dim> queries(bool aligned) const {
        a.dtype == kBFloat16 ? load_queries<bf16>(aligned) : load_queries<fp16>(aligned);
        const int warp = int(threadIdx.x) / kWarpSize;
        WarpQueries<T, Dim> mine;
        mine.rows = {reinterpret_cast<T*>(shared + Places::kQueries + warp * kTileRows * Places::kRow)};
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
        const int32_t* table = a.block_tables + span.sequence * a.table_stride;
        const int block_size = int(a.block_size), from = seen_from(), to = seen_to();
        UNROLL_SOME for (int i = int(threadIdx.x); i < kTileKeys * kChunks; i += kThreads) {
            const int key = i / kChunks, column = i % kChunks * kOfChunk, position = first + key;
            bool is_wanted = position >= from && position < to && column < a.dim;
            int64_t place = 0;
            if (is_wanted) {
                const int block = table[position / block_size];
                is_wanted = block >= 0 && block < a.blocks;
                const int64_t row = (int64_t(block) * a.kv_heads + span.kv_head) * block_size + position % block_size;
                if (is_wanted)
                    place = row * a.dim + column;
                else
                    atomicCAS(a.fault, kOk, kBlockOutside);
            }
            unsigned char* into = shared + stage * Places::kStage + key * Places::kRawRow + column * int(sizeof(Cache));
            copy_16_bytes(into, static_cast<const Cache*>(a.k_cache) + place, is_wanted);
            copy_16_bytes(into + Places::kRawTile, static_cast<const Cache*>(a.v_cache) + place, is_wanted);
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

    __device__ __forceinline__ Scores scores() const {
        const float scale = float(a.scale) * scale_of(a.k_scales, span.kv_head), cap = float(a.soft_cap);
        return {cap == 0.0f ? scale * kLog2E : scale / cap, cap * kLog2E, int(a.window)};
    }

    // The tiles from ``first`` to ``last``, multiples of a tile; finish(section) after each section's last one.
    template <typename Finish>
    __device__ __forceinline__ void walk(const WarpQueries<T, Dim>& q, int first, int last, const Finish& finish) const {
        constexpr int kStages = Places::kStages;
        const int warp = int(threadIdx.x) / kWarpSize, g = int(threadIdx.x) % kWarpSize / 4;
        const int row = warp * kTileRows + g;
        const int positions[2] = {row < span.rows ? position_of(row) : -1,
                                  row + 8 < span.rows ? position_of(row + 8) : -1};
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

__device__ __forceinline__ void store_out(const AttentionArgs& a, int64_t place, float x) {
    if (a.dtype == kBFloat16)
        static_cast<bf16*>(a.out)[place] = from_float<bf16>(x);
    else
        static_cast<fp16*>(a.out)[place] = from_float<fp16>(x);
}

__device__ __forceinline__ int64_t sections_of(int64_t context) { return (context + kSection - 1) / kSection; }

// Where a single token's section leaves its sums: dim of them, then peak and total.
__device__ __forceinline__ float* part_of(const AttentionArgs& a, int sequence, int head, int section) {
    return a.workspace + ((sequence * a.heads + head) * sections_of(a.most_context) + section) * (a.dim + 2);
}

template <typename Cache, int Dim, int Warps, bool IsSplit>
__global__ void __launch_bounds__(Warps* kWarpSize, 1) paged_attention_kernel(AttentionArgs a, bool aligned) {
    Span span;
    if (!find_span<Warps, IsSplit>(a, span)) return;
    using Block = AttentionBlock<Cache, Dim, Warps, IsSplit>;
    const Block block{a, span, dynamic_shared()};
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize, g = lane / 4, t = lane % 4;
    const int from = block.seen_from() / kTileKeys * kTileKeys;
    const int to = (block.seen_to() + kTileKeys - 1) / kTileKeys * kTileKeys;
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
    const float v_scale = scale_of(a.v_scales, span.kv_head);
    UNROLL for (int i = 0; i < 4; i++) {
        const int row = warp * kTileRows + g + i / 2 * 8;
        if (row >= span.rows) continue;
        const Softmax& softmax = whole.softmax[i / 2];
        const int head = block.head_of(row);
        float* part = IsSplit ? part_of(a, span.sequence, head, int(blockIdx.x)) : nullptr;
        const int64_t out = (int64_t(block.token_of(row)) * a.heads + head) * a.dim;
        KEEP_LOOP for (int column = 2 * t + i % 2; column < a.dim; column += 8) {
            const float sum = whole.at(column / 8, i);
            if (IsSplit)
                part[column] = sum;
            else
                store_out(a, out + column, sum / softmax.total * v_scale);
        }
        if (IsSplit && t == 0 && i % 2 == 0) {
            part[a.dim] = softmax.peak;
            part[a.dim + 1] = softmax.total;
        }
    }
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

template <typename Cache, int Dim, int Warps, bool IsSplit>
int start_blocks(const AttentionArgs& a, dim3 grid) {
    const bool aligned = is_aligned<bf16>(a.q, a.q_token_stride) && a.q_head_stride % 8 == 0;
    constexpr int kBytes = Layout<Cache, Dim, Warps, IsSplit>::kBytes;
    const auto kernel = paged_attention_kernel<Cache, Dim, Warps, IsSplit>;
    return launch("paged_attention", kernel, grid, Warps * kWarpSize, kBytes, a.stream, a, aligned);
}

// Smaller blocks where large ones take more memory than the chip has for one, or leave processors without one.
template <typename Cache, int Dim, int Warps>
int start_chunks(const AttentionArgs& a) {
    const int64_t chunks = a.sequences < a.tokens / 2 ? a.sequences : a.tokens / 2;
    const int64_t tiles = a.tokens * (a.heads / a.kv_heads) / (Warps * kTileRows) + chunks;
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
