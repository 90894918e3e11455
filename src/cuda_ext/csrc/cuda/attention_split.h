// Single tokens (flash decoding). A block has the query heads of one KV head, 16 at most, and sections of the sequence's
// context: every gridDim.z-th one, so that blocks beyond the context come last. Each warp brings a tile of keys and values
// by cp.async and multiplies it by itself, the next one under way meanwhile; then all put the tiles together in their
// order. Sums of sections lie in the workspace, and the last block of those heads puts the sections together, in their
// order too.
//
// Peaks are whole numbers, so that what sums are multiplied with are powers of two: here the greatest peak is known before
// sections are added, elsewhere it is not, and a row comes to the same bits.
//
// Numbers of positions, rows and lanes are unsigned: dividing them by constants costs one instruction.
#pragma once

#include "attention_rows.h"

constexpr unsigned kSectionTiles = kSection / kTileKeys;
constexpr int kSplitTurns = 8;  // that processors have at most, with blocks

__host__ __device__ constexpr int64_t sections_of(int64_t context) { return (context + kSection - 1) / kSection; }

// What need not be divided on the device.
struct SplitSizes {
    unsigned group;   // query heads of a KV head
    unsigned tiles;   // of the 16 that a block has at most
    int block_shift;  // of block_size where that is a power of two, else -1
    bool aligned;     // queries
    __device__ __forceinline__ unsigned block_of(const AttentionArgs& a, unsigned position) const {
        return block_shift >= 0 ? position >> block_shift : position / unsigned(a.block_size);
    }
    // What a sequence's block table has for a position; behind its end, its last entry.
    __device__ __forceinline__ int entry_of(const AttentionArgs& a, unsigned sequence, unsigned position) const {
        const unsigned index = block_of(a, position), last = unsigned(a.table_width) - 1;
        return a.block_tables[sequence * a.table_stride + (index < last ? index : last)];
    }
};

// Values take the place of keys where heads are wide. An fp8 cache's tile is widened where it lies. A tile's sums take the
// place of its values, 64 columns at a time: a row's lie in those columns' places of two positions.
template <typename Cache, int Dim, int Warps>
struct SplitShared {
    using T = ElementOf<Cache>;
    static constexpr unsigned kBuffers = Dim > 128 ? 1 : 2;
    static constexpr unsigned kHalfRow = SharedRows<T, Dim>::kStride / 2, kSumsRow = 2 * kHalfRow;  // floats
    union Tile {
        Cache raw[kTileKeys * Dim];
        T rows[kTileKeys * SharedRows<T, Dim>::kStride];
        float sums[kTileRows * kSumsRow];
        // column: a multiple of 4
        __device__ __forceinline__ float* sums_at(unsigned row, unsigned column) {
            return sums + row * kSumsRow + column % 64 / 32 * kHalfRow + column / 64 * 32 + column % 32;
        }
    } tiles[Warps][kBuffers];
    T queries[kTileRows * SharedRows<T, Dim>::kStride];
    Softmax softmax[Warps][kTileRows];
    float peaks[kTileRows];
    int is_last;
};

template <typename Cache, int Dim, int Warps>
struct SplitBlock {
    using Shared = SplitShared<Cache, Dim, Warps>;
    using T = typename Shared::T;
    using Tile = typename Shared::Tile;
    static constexpr unsigned kThreads = Warps * kWarpSize, kBuffers = Shared::kBuffers, kStrip = Warps * kTileKeys;
    static constexpr unsigned kStrips = kSectionTiles / Warps;  // of a section
    static constexpr int kAtOnce = 8;  // turns of a loop that are unrolled
    static constexpr unsigned kQuads = Dim / 4, kItems = (kTileRows * kQuads + kThreads - 1) / kThreads;

    const AttentionArgs& a;
    const SplitSizes& sizes;
    Shared& shared;
    unsigned sequence, token, kv_head, first_head, rows, from, to;  // positions that are seen
    unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

    // Four columns of a row of sums, which a thread has for a section.
    struct Item {
        float sums[4];
        Softmax softmax;
    };

    __device__ __forceinline__ unsigned first_section() const { return from / kSection; }
    __device__ __forceinline__ unsigned last_section() const { return (to + kSection - 1) / kSection; }
    __device__ __forceinline__ unsigned last_strip() const { return (to + kStrip - 1) / kStrip; }

    __device__ __forceinline__ unsigned after(unsigned strip) const {
        return (strip + 1) % kStrips ? strip + 1 : (strip / kStrips + gridDim.z) * kStrips;
    }
    __device__ __forceinline__ unsigned position_in(unsigned strip) const { return strip * kStrip + threadIdx.x; }

    // Of a position's elements in the cache, in units of 16 bytes; kNowhere for one that is not seen, and where there is no
    // block.
    __device__ __forceinline__ uint32_t place_of(unsigned position, int entry) const {
        if (position < from || position >= to) return kNowhere;
        const uint32_t block_size = uint32_t(a.block_size), units = uint32_t(a.dim) * uint32_t(sizeof(Cache)) / 16;
        const uint32_t in_block = position - sizes.block_of(a, position) * block_size;
        if (entry >= 0 && entry < int(a.blocks))
            return ((uint32_t(entry) * uint32_t(a.kv_heads) + kv_head) * block_size + in_block) * units;
        atomicCAS(a.fault, kOk, kBlockOutside);
        return kNowhere;
    }

    // Asks for a tile, of which each lane knows the place of one position; what is not there are zeros.
    __device__ __forceinline__ void bring(Tile& tile, const void* cache, uint32_t my_place) const {
        constexpr unsigned kOfChunk = 16 / sizeof(Cache), kChunks = Dim / kOfChunk;
        constexpr unsigned kStride = std::is_same_v<Cache, T> ? SharedRows<T, Dim>::kStride : Dim;
        const unsigned column = lane % kChunks * kOfChunk, first = lane / kChunks;
        const auto* mine = static_cast<const unsigned char*>(cache) + lane % kChunks * 16;
        Cache* to = tile.raw + first * kStride + column;
        UNROLL_SOME for (unsigned i = 0; i < kTileKeys; i += kWarpSize / kChunks) {
            const uint32_t place = __shfl_sync(kAllLanes, my_place, int(first + i));
            const bool is_wanted = place != kNowhere && column < unsigned(a.dim);
            copy_16_bytes(to + i * kStride, mine + uint64_t(place) * 16, is_wanted);
        }
    }

    __device__ __forceinline__ SharedRows<T, Dim> widened(Tile& tile) const {
        if constexpr (!std::is_same_v<Cache, T>) {
            constexpr unsigned kOfLane = kTileKeys * Dim / 8 / kWarpSize;
            uint2 codes[kOfLane];
            UNROLL for (unsigned i = 0; i < kOfLane; i++)
                codes[i] = load_whole<uint2>(tile.raw + (i * kWarpSize + lane) * 8);
            __syncwarp();
            UNROLL for (unsigned i = 0; i < kOfLane; i++) {
                const unsigned row = (i * kWarpSize + lane) / (Dim / 8), column = (i * kWarpSize + lane) % (Dim / 8) * 8;
                store_whole(tile.rows + row * SharedRows<T, Dim>::kStride + column, widened_eight(codes[i]));
            }
            __syncwarp();
        }
        return {tile.rows};
    }

    // Whether queries are copied as they are.
    __device__ __forceinline__ bool has_same_queries() const {
        return sizes.aligned && a.dtype == (std::is_same_v<T, bf16> ? kBFloat16 : kFloat16);
    }

    __device__ __forceinline__ void bring_queries() const {
        KEEP_LOOP for (unsigned i = threadIdx.x; i < kTileRows * Dim / 8; i += kThreads) {
            const unsigned row = i / (Dim / 8), column = i % (Dim / 8) * 8;
            const T* q = static_cast<const T*>(a.q) + token * a.q_token_stride + (first_head + row) * a.q_head_stride;
            const bool is_wanted = row < rows && column < unsigned(a.dim);
            copy_16_bytes(shared.queries + row * SharedRows<T, Dim>::kStride + column, q + column, is_wanted);
        }
    }

    template <typename Q>
    __device__ __forceinline__ void load_queries() const {
        KEEP_LOOP for (unsigned i = threadIdx.x; i < kTileRows * Dim / 8; i += kThreads) {
            const unsigned row = i / (Dim / 8), column = i % (Dim / 8) * 8;
            const Q* q = static_cast<const Q*>(a.q) + token * a.q_token_stride + (first_head + row) * a.q_head_stride;
            float eight[8] = {};
            if (row < rows && column < unsigned(a.dim)) load_eight(eight, q + column, 8, sizes.aligned);
            store_eight(shared.queries + row * SharedRows<T, Dim>::kStride + column, eight, 8, true);
        }
    }

    // Of the eight rows that there always are, or of 16.
    __device__ __forceinline__ unsigned halves() const { return rows > kTileRows / 2 ? 2 : 1; }

    // The warp's sums of 64 columns.
    __device__ __forceinline__ void keep(const float (&sums)[8][4], unsigned column) const {
        __syncwarp();
        UNROLL for (unsigned i = 0; i < 2; i++) {
            const unsigned row = lane / 4 + 8 * i;
            if (row >= rows) continue;
            float* to = shared.tiles[warp][kBuffers - 1].sums_at(row, column) + lane % 4 * 2;
            UNROLL for (unsigned n = 0; n < 8; n++)
                store_whole(to + n / 4 * Shared::kHalfRow + n % 4 * 8, float2{sums[n][2 * i], sums[n][2 * i + 1]});
        }
    }

    __device__ __forceinline__ void keep(const Softmax (&softmax)[2]) const {
        UNROLL for (unsigned i = 0; i < 2; i++) {
            const unsigned row = lane / 4 + 8 * i;
            if (lane % 4 == 0 && row < rows) shared.softmax[warp][row] = softmax[i];
        }
    }

    // Does what is to be done with each of this thread's items: ``act(item, row, column)``.
    template <typename Act>
    __device__ __forceinline__ void for_each_item(Item (&items)[kItems], const Act& act) const {
        UNROLL for (unsigned i = 0; i < kItems; i++) {
            const unsigned at = threadIdx.x + i * kThreads, row = at / kQuads, column = at % kQuads * 4;
            if (row < rows && column < unsigned(a.dim)) act(items[i], row, column);
        }
    }

    // All warps' tiles, in their order.
    __device__ __forceinline__ void add_tiles(Item (&items)[kItems]) const {
        for_each_item(items, [&](Item& item, unsigned row, unsigned column) {
            UNROLL for (unsigned tile = 0; tile < Warps; tile++) {
                const Weights w = put_together(item.softmax, shared.softmax[tile][row]);
                const auto part = load_whole<float4>(shared.tiles[tile][kBuffers - 1].sums_at(row, column));
                const float four[4] = {part.x, part.y, part.z, part.w};
                UNROLL for (int i = 0; i < 4; i++) item.sums[i] = fmaf(four[i], w.take, item.sums[i] * w.keep);
            }
        });
    }

    __device__ __forceinline__ static void start(Item (&items)[kItems]) {
        UNROLL for (unsigned i = 0; i < kItems; i++) items[i] = {{}, {-INFINITY, 0.0f}};
    }

    __device__ __forceinline__ int64_t part_of(unsigned row, unsigned section) const {
        return (sequence * a.heads + first_head + row) * sections_of(a.most_context) + section;
    }
    // Behind all sums.
    __device__ __forceinline__ Softmax* parts_softmax() const {
        return reinterpret_cast<Softmax*>(a.workspace + a.sequences * a.heads * sections_of(a.most_context) * a.dim);
    }

    __device__ __forceinline__ void store_part(Item (&items)[kItems], unsigned section) const {
        for_each_item(items, [&](const Item& item, unsigned row, unsigned column) {
            const int64_t part = part_of(row, section);
            store_whole(a.workspace + part * a.dim + column,
                        float4{item.sums[0], item.sums[1], item.sums[2], item.sums[3]});
            if (column == 0) parts_softmax()[part] = item.softmax;
        });
    }

    __device__ __forceinline__ void store_result(Item (&items)[kItems]) const {
        const float v_scale = scale_of(a.v_scales, kv_head);
        for_each_item(items, [&](const Item& item, unsigned row, unsigned column) {
            const int64_t out = (token * a.heads + first_head + row) * a.dim + column;
            UNROLL for (int i = 0; i < 4; i++) store_out(a, out + i, item.sums[i] / item.softmax.total * v_scale);
        });
    }

    // From the strip on, whose first copies this asks for, to this block's last one.
    __device__ __forceinline__ void walk(unsigned strip, int entry) const {
        Tile& keys = shared.tiles[warp][0];
        Tile& values = shared.tiles[warp][kBuffers - 1];
        uint32_t place = place_of(position_in(strip), entry);
        if (has_same_queries()) bring_queries();
        bring(keys, a.k_cache, place);
        commit_copies();
        if (kBuffers > 1) {
            bring(values, a.v_cache, place);
            commit_copies();
        }
        if (!has_same_queries()) a.dtype == kBFloat16 ? load_queries<bf16>() : load_queries<fp16>();
        WarpQueries<T, Dim, false> q;
        q.rows = {shared.queries};
        const Scores how = scores_of(a, int(kv_head));
        const bool is_only = last_section() - first_section() == 1;
        const int positions[2] = {int(to) - 1, int(to) - 1};
        Item items[kItems];
        start(items);
        wait_for_copies<kBuffers - 1>();
        __syncthreads();
        while (true) {
            const unsigned next = after(strip), first = strip * kStrip + warp * kTileKeys;
            const bool has_next = next < last_strip(), is_seen = first >= from && first + kTileKeys <= to;
            if (has_next) entry = sizes.entry_of(a, sequence, position_in(next));
            wait_for_copies<kBuffers - 1>();
            __syncwarp();
            float weights[kTileKeys / 8][4] = {};
            WarpRows<T, Dim>::multiply_keys(q, widened(keys), weights);
            __syncwarp();
            if (kBuffers == 1) bring(values, a.v_cache, place);
            if (has_next) place = place_of(position_in(next), entry);
            if (kBuffers > 1 && has_next) bring(keys, a.k_cache, place);
            commit_copies();
            Softmax softmax[2];
            float sums[8][4];
            WarpRows<T, Dim>::weigh_tile(weights, softmax, int(first), positions, how, is_seen, int(halves()));
            keep(softmax);
            wait_for_copies<kBuffers - 1>();
            __syncwarp();
            WarpRows<T, Dim>::multiply_values(
                weights, widened(values), int(a.dim), [&](int n, const float (&products)[4]) {
                    UNROLL for (int i = 0; i < 4; i++) sums[n % 8][i] = products[i];
                    if (n % 8 == 7) keep(sums, unsigned(n) / 8 * 64);
                });
            __syncthreads();
            add_tiles(items);
            if (!has_next || next / kStrips != strip / kStrips) {
                is_only ? store_result(items) : store_part(items, strip / kStrips);
                start(items);
            }
            if (!has_next) return;
            __syncthreads();
            kBuffers > 1 ? bring(values, a.v_cache, place) : bring(keys, a.k_cache, place);
            commit_copies();
            strip = next;
        }
    }

    // Whether all other blocks of these heads have left their sums, which this one then sees.
    __device__ __forceinline__ bool is_last() const {
        const unsigned sections = last_section() - first_section();
        const int blocks = int(sections < gridDim.z ? sections : gridDim.z);
        int32_t* counter = reinterpret_cast<int32_t*>(a.workspace + a.workspace_floats) - 1;
        counter -= sequence * a.heads + first_head;
        __syncthreads();
        if (threadIdx.x == 0) {
            shared.is_last = blocks == 1 || count_in(counter) == blocks - 1;
            if (shared.is_last) {
                see_counted();
                *counter = 0;
            }
        }
        __syncthreads();
        return shared.is_last;
    }

    __device__ __forceinline__ void merge() const {
        const Softmax* softmax = parts_softmax();
        const unsigned sections = last_section() - first_section();
        for (unsigned row = warp; row < rows; row += Warps) {
            const Softmax* mine = softmax + part_of(row, first_section());
            float peak = -INFINITY;
            for (unsigned i = lane; i < sections; i += kWarpSize) peak = fmaxf(peak, mine[i].peak);
            UNROLL for (int mask = 16; mask > 0; mask /= 2) peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, mask));
            if (lane == 0) shared.peaks[row] = peak;
        }
        __syncthreads();
        Item items[kItems];
        start(items);
        for_each_item(items, [&](Item& item, unsigned row, unsigned column) {
            const int64_t first = part_of(row, first_section());
            const float* sums = a.workspace + first * a.dim + column;
            const float peak = shared.peaks[row];
            UNROLL_SOME for (unsigned i = 0; i < sections; i++) {
                const Softmax section = softmax[first + i];
                const auto part = load_whole<float4>(sums + i * unsigned(a.dim));
                const float take = exp_two(section.peak - peak), four[4] = {part.x, part.y, part.z, part.w};
                UNROLL for (int j = 0; j < 4; j++) item.sums[j] = fmaf(four[j], take, item.sums[j]);
                item.softmax.total = fmaf(section.total, take, item.softmax.total);
            }
        });
        store_result(items);
    }
};

// Blocks that a processor has at once, as memory and registers allow. Those before sm_90 have the memory for four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kNarrowBlocks = 4;
#else
constexpr int kNarrowBlocks = 5;
#endif
template <typename Cache, int Dim, int Warps>
constexpr int kSplitBlocks = Warps > 4 ? 1 : Dim > 128 ? 2 : Dim > 64 ? 3 : sizeof(Cache) > 1 ? kNarrowBlocks : 4;

template <typename Cache, int Dim, int Warps>
__global__ void __launch_bounds__(Warps* kWarpSize, kSplitBlocks<Cache, Dim, Warps>)
    paged_attention_split_kernel(AttentionArgs a, SplitSizes sizes) {
    begin_kernel();
    using Block = SplitBlock<Cache, Dim, Warps>;
    // All that is to be looked up is asked for at once: without a window the first position is known before the context is.
    const unsigned sequence = blockIdx.y;
    int entry = a.window > 0 ? 0 : sizes.entry_of(a, sequence, blockIdx.z * kSection + threadIdx.x);
    const int context = a.context_lens[sequence], token = a.query_starts[sequence];
    const int tokens = a.query_starts[sequence + 1] - token;
    if ((tokens != 1) | !fits(a, 1, context)) {
        if (tokens == 1) tell_of_context(a);
        return;
    }
    const unsigned kv_head = sizes.tiles == 1 ? blockIdx.x : blockIdx.x / sizes.tiles;
    const unsigned first_row = (blockIdx.x - kv_head * sizes.tiles) * kTileRows, left = sizes.group - first_row;
    auto& shared = *reinterpret_cast<typename Block::Shared*>(dynamic_shared());
    const Block block{a, sizes, shared, sequence, unsigned(token), kv_head, kv_head * sizes.group + first_row,
                      left < kTileRows ? left : kTileRows, unsigned(first_seen(a, context - 1)), unsigned(context)};
    const unsigned section = block.first_section() + blockIdx.z;
    if (section >= block.last_section()) return;
    const unsigned begin = section * kSection, strip = (begin > block.from ? begin : block.from) / Block::kStrip;
    if (a.window > 0) entry = sizes.entry_of(a, sequence, block.position_in(strip));
    block.walk(strip, entry);
    if (block.last_section() - block.first_section() > 1 && block.is_last()) block.merge();
}
