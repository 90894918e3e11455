// Which rows a block of attention has, what they see of the cache, and where their results go.
#pragma once

#include "attention_tile.h"

constexpr uint32_t kNowhere = 0xffffffff;  // where a row of the cache would lie that nobody sees

// The rows of a block: ``rows`` of them from the first of its sequence's.
struct Span {
    int sequence, first_token, tokens, context, first_row, rows, kv_head;
};

// The sequence of the index-th tile of ``tile_rows`` rows, counting through those of several tokens, or the index-th from
// the end. All lanes alike.
template <bool IsFromEnd = false>
__device__ inline bool find_tile(const AttentionArgs& a, int index, int tile_rows, Span& span) {
    const int lane = int(threadIdx.x) % kWarpSize, group = int(a.heads / a.kv_heads);
    for (int base = 0; base < a.sequences; base += kWarpSize) {
        const int sequence = IsFromEnd ? int(a.sequences) - 1 - base - lane : base + lane;
        const int tokens = base + lane < a.sequences ? a.query_starts[sequence + 1] - a.query_starts[sequence] : 0;
        const int tiles = tokens > 1 ? (tokens * group + tile_rows - 1) / tile_rows : 0;
        int end = tiles;
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const int before = __shfl_up_sync(kAllLanes, end, distance);
            if (lane >= distance) end += before;
        }
        const uint32_t beyond = __ballot_sync(kAllLanes, end > index);
        if (beyond) {
            const int found = __ffs(beyond) - 1;
            span.sequence = __shfl_sync(kAllLanes, sequence, found);
            span.tokens = __shfl_sync(kAllLanes, tokens, found);
            const int before = __shfl_sync(kAllLanes, end - tiles, found), behind = __shfl_sync(kAllLanes, end, found) - 1;
            span.first_row = (IsFromEnd ? behind - index : index - before) * tile_rows;
            return true;
        }
        index -= __shfl_sync(kAllLanes, end, kWarpSize - 1);
    }
    return false;
}

// Whether a context has room for its new tokens and is one that the step was made for.
__device__ __forceinline__ bool fits(const AttentionArgs& a, int tokens, int context) {
    return context >= tokens && context <= a.table_width * a.block_size && context <= a.most_context;
}

__device__ __forceinline__ void tell_of_context(const AttentionArgs& a) {
    if (threadIdx.x % kWarpSize == 0) atomicCAS(a.fault, kOk, kContextTooShort);
}

// What follows from a sequence and a first row; false where the sequence does not fit what the caller says of it.
__device__ inline bool complete_span(const AttentionArgs& a, int tile_rows, Span& span) {
    const int left = span.tokens * int(a.heads / a.kv_heads) - span.first_row;
    span.rows = left < tile_rows ? left : tile_rows;
    span.first_token = a.query_starts[span.sequence];
    span.context = a.context_lens[span.sequence];
    if (fits(a, span.tokens, span.context)) return true;
    tell_of_context(a);
    return false;
}

// Of a chunk's tile; false where the block has nothing to do.
template <int Warps>
__device__ bool find_span(const AttentionArgs& a, Span& span) {
    constexpr int kRows = Warps * kTileRows;
    span.kv_head = int(blockIdx.y);
    return find_tile(a, int(blockIdx.x), kRows, span) && complete_span(a, kRows, span);
}

__device__ __forceinline__ void store_out(const AttentionArgs& a, int64_t place, float x) {
    if (a.dtype == kBFloat16)
        static_cast<bf16*>(a.out)[place] = from_float<bf16>(x);
    else
        static_cast<fp16*>(a.out)[place] = from_float<fp16>(x);
}

// The first position that a token at ``position`` sees.
__device__ __forceinline__ int first_seen(const AttentionArgs& a, int position) {
    const int first = position + 1 - int(a.window);
    return a.window > 0 && first > 0 ? first : 0;
}

__device__ __forceinline__ Scores scores_of(const AttentionArgs& a, int kv_head) {
    const float scale = float(a.scale) * scale_of(a.k_scales, kv_head), cap = float(a.soft_cap);
    return {cap == 0.0f ? scale * kLog2E : scale / cap, cap * kLog2E, int(a.window)};
}

// Of a block. Lane 4 · g + t of a warp has rows g and g + 8 of the warp's 16.
struct BlockRows {
    const AttentionArgs& a;
    const Span& span;
    int group = int(a.heads / a.kv_heads);
    int first_position = span.context - span.tokens;
    // The first position that any row sees, and the one behind the last.
    int seen_from = first_seen(a, position_of(0)), seen_to = position_of(span.rows - 1) + 1;

    __device__ __forceinline__ int position_of(int row) const { return first_position + (span.first_row + row) / group; }
    __device__ __forceinline__ int head_of(int row) const { return span.kv_head * group + (span.first_row + row) % group; }
    __device__ __forceinline__ int token_of(int row) const { return span.first_token + (span.first_row + row) / group; }

    // Of this lane's two rows, -1 where there is none.
    __device__ __forceinline__ void lane_positions(int (&positions)[2]) const {
        UNROLL for (int i = 0; i < 2; i++) {
            const int row = lane_row() + 8 * i;
            positions[i] = row < span.rows ? position_of(row) : -1;
        }
    }
    __device__ __forceinline__ static int lane_row() {
        return int(threadIdx.x) / kWarpSize * kTileRows + int(threadIdx.x) % kWarpSize / 4;
    }

    // Of a position's keys and values among all of the cache; -1 for one that no row sees, and where there is no block.
    __device__ __forceinline__ int64_t cache_row(int position) const {
        if (position < seen_from || position >= seen_to) return -1;
        const int block_size = int(a.block_size);
        const int block = a.block_tables[span.sequence * a.table_stride + position / block_size];
        if (block >= 0 && block < a.blocks)
            return (int64_t(block) * a.kv_heads + span.kv_head) * block_size + position % block_size;
        atomicCAS(a.fault, kOk, kBlockOutside);
        return -1;
    }

    __device__ __forceinline__ Scores scores() const { return scores_of(a, span.kv_head); }

    // As rows of SharedRows; zeros beyond the last row and dim.
    template <typename T, int Dim, int Rows, int Threads>
    __device__ __forceinline__ void load_queries(T* to, bool aligned) const {
        a.dtype == kBFloat16 ? load_queries_of<bf16, T, Dim, Rows, Threads>(to, aligned)
                             : load_queries_of<fp16, T, Dim, Rows, Threads>(to, aligned);
    }

    template <typename Q, typename T, int Dim, int Rows, int Threads>
    __device__ __forceinline__ void load_queries_of(T* to, bool aligned) const {
        KEEP_LOOP for (int i = int(threadIdx.x); i < Rows * Dim / 8; i += Threads) {
            const int row = i / (Dim / 8), column = i % (Dim / 8) * 8;
            const Q* q = static_cast<const Q*>(a.q) + token_of(row) * a.q_token_stride + head_of(row) * a.q_head_stride;
            float eight[8] = {};
            if (row < span.rows && column < a.dim) load_eight(eight, q + column, 8, aligned);
            store_eight(to + row * SharedRows<T, Dim>::kStride + column, eight, 8, true);
        }
    }

    // The results of this warp's rows.
    template <typename T, int Dim>
    __device__ __forceinline__ void store(const WholeRows<T, Dim>& whole) const {
        const float v_scale = scale_of(a.v_scales, span.kv_head);
        const int t = int(threadIdx.x) % 4;
        UNROLL for (int i = 0; i < 4; i++) {
            const int row = lane_row() + i / 2 * 8;
            if (row >= span.rows) continue;
            const Softmax& softmax = whole.softmax[i / 2];
            const int64_t out = (int64_t(token_of(row)) * a.heads + head_of(row)) * a.dim;
            KEEP_LOOP for (int column = 2 * t + i % 2; column < a.dim; column += 8)
                store_out(a, out + column, whole.at(column / 8, i) / softmax.total * v_scale);
        }
    }
};
