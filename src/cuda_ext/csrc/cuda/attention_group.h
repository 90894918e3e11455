// Chunks of many rows on sm_90a, for caches of 16 bits, with wgmma. One or two warpgroups have 64
// rows each; one more brings tiles of keys and of values by turns into a ring of slots, which mbarriers say are full or
// empty. As in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), weights · values of one tile are under way together
// with the scores of the next, and while a warpgroup makes weights of scores the other one multiplies.
//
// A row is summed up over all of its tiles, not by sections: ``is_deterministic`` keeps to the kernel of
// paged_attention.cu.
#pragma once

#include "attention_rows.h"

constexpr int kGroupRows = 64, kGroupWarps = kGroupRows / kTileRows;
constexpr int kBringers = 4;  // warps

template <int Groups>
constexpr int kGroupThreads = (Groups * kGroupWarps + kBringers) * kWarpSize;

// All lie in panels of 64 columns. Results take the place of queries.
template <typename T, int Dim, int Groups>
struct AttentionShared {
    static constexpr int kTurnKeys = Dim > 128 ? 64 : 128;  // positions of a tile
    static constexpr int kSlots = Dim > 64 ? 4 : 8, kPanels = Dim / kGroupRow;
    static constexpr int kPanel = kTurnKeys * kGroupRow, kQueryPanel = Groups * kGroupRows * kGroupRow;
    T slots[kSlots][kPanels * kPanel];
    T queries[kPanels * kQueryPanel];
    Mbarrier full[kSlots], empty[kSlots];
    Mbarrier ready[Groups], turns[Groups];  // a warpgroup's queries are there; it may multiply
};

template <typename T, int Dim, int Groups>
struct AttentionGroup : BlockRows {
    using Shared = AttentionShared<T, Dim, Groups>;
    static constexpr int kTurnKeys = Shared::kTurnKeys, kTurnTiles = kTurnKeys / 8, kWarpKeys = kTurnKeys / kBringers;
    static constexpr int kSlots = Shared::kSlots, kPanel = Shared::kPanel, kQueryPanel = Shared::kQueryPanel;
    static constexpr int kChunks = Dim / 8;
    static_assert(kWarpKeys <= kWarpSize, "a lane that brings looks for one position of a tile");
    static constexpr int kAtOnce = 4;  // turns of a loop that are unrolled
    static constexpr uint32_t kNowhere = 0xffffffff;

    Shared& shared;
    int warp = uniform(int(threadIdx.x) / kWarpSize), warpgroup = warp / kGroupWarps;
    // The first tile's first position, and how many tiles: as every lane knows them, or wgmma would wait for itself.
    int first = uniform(seen_from) / kTurnKeys * kTurnKeys;
    int turns = uniform((seen_to - first + kTurnKeys - 1) / kTurnKeys);

    __device__ __forceinline__ void start_barriers() const {
        if (threadIdx.x == 0) {
            for (int slot = 0; slot < kSlots; slot++) {
                start_barrier(shared.full[slot], kBringers);
                start_barrier(shared.empty[slot], Groups * kGroupWarps);
            }
            for (int i = 0; i < Groups; i++) {
                start_barrier(shared.ready[i], kGroupWarps);
                start_barrier(shared.turns[i], kGroupWarps);
            }
        }
    }

    // This warp has done what the barrier waits for.
    __device__ __forceinline__ void tell(Mbarrier& at) const {
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) arrive(at);
    }

    // The order of what is brought: keys 0, keys 1, values 0, keys 2, values 1, …
    __device__ __forceinline__ static int item_of_keys(int turn) { return turn == 0 ? 0 : 2 * turn - 1; }
    __device__ __forceinline__ int item_of_values(int turn) const { return turn + 1 < turns ? 2 * turn + 2 : 2 * turn + 1; }

    // What the which-th of the warps does that bring keys and values. A lane looks for one position of each tile, and its
    // block's number is asked for a turn ahead.
    __device__ __forceinline__ void bring(int which) const {
        int position = first + which * kWarpKeys + int(threadIdx.x) % kWarpKeys, item = 0, block = block_of(position);
        uint32_t values = kNowhere;
        KEEP_LOOP for (int turn = 0; turn < turns; turn++, position += kTurnKeys) {
            const uint32_t keys = place_of(position, block);
            block = block_of(position + kTurnKeys);
            bring_item(item++, a.k_cache, keys, which);
            if (turn > 0) bring_item(item++, a.v_cache, values, which);
            values = keys;
        }
        bring_item(item, a.v_cache, values, which);
        tell_full<0>(item);
    }

    __device__ __forceinline__ bool is_seen(int position) const { return position >= seen_from && position < seen_to; }

    __device__ __forceinline__ int block_of(int position) const {
        const int64_t row = int64_t(span.sequence) * a.table_stride;
        return is_seen(position) ? a.block_tables[row + position / int(a.block_size)] : 0;
    }

    // Of a position's keys and values in the cache, in 16 bytes.
    __device__ __forceinline__ uint32_t place_of(int position, int block) const {
        if (!is_seen(position)) return kNowhere;
        const int block_size = int(a.block_size);
        if (block >= 0 && block < a.blocks)
            return uint32_t(((int64_t(block) * a.kv_heads + span.kv_head) * block_size + position % block_size) * a.dim / 8);
        atomicCAS(a.fault, kOk, kBlockOutside);
        return kNowhere;
    }

    // Copies into the item's slot; an item is told to be there once the next one has been asked for.
    __device__ __forceinline__ void bring_item(int item, const void* cache, uint32_t my_place, int which) const {
        const int slot = item % kSlots, lane = int(threadIdx.x) % kWarpSize, column = lane % kChunks * 8;
        if (item >= kSlots) wait_for_phase(shared.empty[slot], item / kSlots - 1);
        T* to = shared.slots[slot] + column / kGroupRow * kPanel;
        UNROLL_SOME for (int i = 0; i < kWarpKeys; i += kWarpSize / kChunks) {
            const int key = i + lane / kChunks;
            const uint32_t place = __shfl_sync(kAllLanes, my_place, key);
            const bool is_wanted = place != kNowhere && column < a.dim;
            const T* from = static_cast<const T*>(cache) + (is_wanted ? uint64_t(place) * 8 + column : 0);
            copy_16_bytes(to + swizzled(which * kWarpKeys + key, column % kGroupRow), from, is_wanted);
        }
        commit_copies();
        if (item > 0) tell_full<1>(item - 1);
    }

    template <int Later>
    __device__ __forceinline__ void tell_full(int item) const {
        wait_for_copies<Later>();
        show_to_products();
        tell(shared.full[item % kSlots]);
    }

    // This warpgroup's; zeros beyond the last row and dim.
    __device__ __forceinline__ void load_queries(bool aligned) const {
        a.dtype == kBFloat16 ? load_queries_of<bf16>(aligned) : load_queries_of<fp16>(aligned);
        show_to_products();
        tell(shared.ready[warpgroup]);
        wait_for_phase(shared.ready[warpgroup], 0);
    }

    template <typename Q>
    __device__ __forceinline__ void load_queries_of(bool aligned) const {
        constexpr int kThreads = kGroupWarps * kWarpSize, kEach = kGroupRows * kChunks / kThreads;
        const int thread = int(threadIdx.x) % kThreads, column = thread % kChunks * 8;
        const auto row_of = [&](int i) { return warpgroup * kGroupRows + thread / kChunks + i * (kThreads / kChunks); };
        const auto from = [&](int row) {
            const Q* q = static_cast<const Q*>(a.q) + token_of(row) * a.q_token_stride;
            return q + head_of(row) * a.q_head_stride + column;
        };
        T* to = shared.queries + column / kGroupRow * kQueryPanel;
        if (std::is_same_v<Q, T> && aligned) {
            uint4 chunks[kEach] = {};
            UNROLL for (int i = 0; i < kEach; i++)
                if (row_of(i) < span.rows && column < a.dim) chunks[i] = load_whole<uint4>(from(row_of(i)));
            UNROLL for (int i = 0; i < kEach; i++) store_whole(to + swizzled(row_of(i), column % kGroupRow), chunks[i]);
            return;
        }
        KEEP_LOOP for (int i = 0; i < kEach; i++) {
            float eight[8] = {};
            if (row_of(i) < span.rows && column < a.dim) load_eight(eight, from(row_of(i)), 8, aligned);
            store_eight(to + swizzled(row_of(i), column % kGroupRow), eight, 8, true);
        }
    }

    // What a lane knows of its two rows, of each of which it has 2t and 2t + 1 of eight columns: the positions that they
    // see, and the sums of their weights relative to a peak, of which ``totals`` are of this lane's columns.
    struct Rows {
        int from[2], to[2];
        float peaks[2] = {-INFINITY, -INFINITY}, totals[2] = {};
    };

    __device__ __forceinline__ int last_row_or(int row) const { return row < span.rows ? row : span.rows - 1; }

    // What a warp with rows does.
    __device__ __forceinline__ void attend(bool is_aligned_out) const {
        Rows rows;
        UNROLL for (int i = 0; i < 2; i++) {
            rows.to[i] = position_of(last_row_or(lane_row() + 8 * i));
            rows.from[i] = a.window > 0 ? rows.to[i] - int(a.window) + 1 : 0;
        }
        const Scores how = scores();
        float sums[Dim / 8][4] = {}, s[kTurnTiles][4], keep[2];
        uint32_t weights[kTurnKeys / 16][4];
        wait_for_keys(0);
        multiply_keys(s, 0);
        wait_for_products<0>(s);
        tell(shared.empty[0]);
        weigh(s, 0, rows, how, keep);
        pair_up(s, weights);
        if (turns > 1) wait_for_keys(1);
        KEEP_LOOP for (int turn = 1; turn < turns; turn++) {
            take_turn(turn);
            multiply_keys(s, turn);
            add_values(sums, weights, turn - 1);
            if constexpr (Groups > 1) tell(shared.turns[1 - warpgroup]);
            wait_for_products<1>(s);
            tell(shared.empty[item_of_keys(turn) % kSlots]);
            weigh(s, turn, rows, how, keep);
            // A branch, which also keeps the assembler from putting the weights off until the products have ended.
            if (turn + 1 < turns) wait_for_keys(turn + 1);
            wait_for_products<0>(sums, weights);
            tell(shared.empty[item_of_values(turn - 1) % kSlots]);
            if (__ballot_sync(kAllLanes, keep[0] != 1.0f || keep[1] != 1.0f))
                UNROLL for (int n = 0; n < Dim / 8; n++)
                    UNROLL for (int i = 0; i < 4; i++) sums[n][i] *= keep[i / 2];
            pair_up(s, weights);
        }
        add_values(sums, weights, turns - 1);
        wait_for_products<0>(sums, weights);
        store(sums, rows, is_aligned_out);
    }

    // The first warpgroup multiplies first, then they take turns.
    __device__ __forceinline__ void take_turn(int turn) const {
        if constexpr (Groups > 1)
            if (warpgroup > 0 || turn > 1) wait_for_phase(shared.turns[warpgroup], turn - 2 + warpgroup);
    }

    __device__ __forceinline__ void wait_for_keys(int turn) const {
        const int item = item_of_keys(turn);
        wait_for_phase(shared.full[item % kSlots], item / kSlots);
    }

    __device__ __forceinline__ void multiply_keys(float (&s)[kTurnTiles][4], int turn) const {
        const int slot = item_of_keys(turn) % kSlots;
        const T* queries = shared.queries + warpgroup * kGroupRows * kGroupRow;
        begin_products(s);
        UNROLL for (int d = 0; d < Dim / 16; d++)
            multiply_group_shared(s, queries + d / 4 * kQueryPanel, shared.slots[slot] + d / 4 * kPanel, d % 4, d > 0);
        commit_products();
    }

    __device__ __forceinline__ void add_values(float (&sums)[Dim / 8][4], uint32_t (&weights)[kTurnKeys / 16][4],
                                               int turn) const {
        constexpr int kHalves = Dim > 128 ? 2 : 1;  // of 128 columns
        const int item = item_of_values(turn), slot = item % kSlots;
        wait_for_phase(shared.full[slot], item / kSlots);
        begin_products(sums, weights);
        UNROLL for (int step = 0; step < kTurnKeys / 16; step++)
            UNROLL for (int half = 0; half < kHalves; half++) {
                auto& some = reinterpret_cast<float(&)[Dim / 8 / kHalves][4]>(sums[half * (Dim / 8 / kHalves)]);
                multiply_group_rows(some, weights[step], shared.slots[slot] + half * 2 * kPanel, step, kPanel);
            }
        commit_products();
    }

    // Products become weights relative to the rows' peaks. keep: what the sums so far are to be multiplied with.
    __device__ __forceinline__ void weigh(float (&s)[kTurnTiles][4], int turn, Rows& rows, const Scores& how,
                                          float (&keep)[2]) const {
        const float factor = how.cap == 0.0f ? how.scale : 1.0f;
        if (how.cap != 0.0f)
            UNROLL for (int n = 0; n < kTurnTiles; n++)
                UNROLL for (int i = 0; i < 4; i++) s[n][i] = how.of(s[n][i]);
        hide(s, first + turn * kTurnKeys, rows);
        float peaks[4] = {rows.peaks[0], rows.peaks[0], rows.peaks[1], rows.peaks[1]}, totals[4] = {};
        UNROLL for (int n = 0; n < kTurnTiles; n++)
            UNROLL for (int i = 0; i < 4; i++) peaks[i] = fmaxf(peaks[i], s[n][i]);  // NaN goes into the totals
        float from[2];
        UNROLL for (int row = 0; row < 2; row++) {
            float peak = fmaxf(peaks[2 * row], peaks[2 * row + 1]);
            UNROLL for (int mask = 1; mask < 4; mask *= 2) peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, mask));
            from[row] = peak == -INFINITY ? 0.0f : peak * factor;
            keep[row] = exp_two(fmaf(rows.peaks[row], factor, -from[row]));
            rows.peaks[row] = peak;
        }
        UNROLL for (int n = 0; n < kTurnTiles; n++)
            UNROLL for (int i = 0; i < 4; i++) totals[i] += s[n][i] = exp_two(fmaf(s[n][i], factor, -from[i / 2]));
        UNROLL for (int row = 0; row < 2; row++)
            rows.totals[row] = fmaf(rows.totals[row], keep[row], totals[2 * row] + totals[2 * row + 1]);
    }

    // What a row does not see, in tiles that hold such.
    __device__ __forceinline__ void hide(float (&s)[kTurnTiles][4], int base, const Rows& rows) const {
        const int lowest = position_of(last_row_or(warpgroup * kGroupRows));
        const int highest = position_of(last_row_or(warpgroup * kGroupRows + kGroupRows - 1));
        if (base + kTurnKeys - 1 <= lowest && (a.window == 0 || base > highest - a.window)) return;
        const int column = base + int(threadIdx.x) % 4 * 2;
        UNROLL for (int row = 0; row < 2; row++) {
            const int from = rows.from[row] - column, to = rows.to[row] - column;
            UNROLL for (int n = 0; n < kTurnTiles; n++)
                UNROLL for (int i = 0; i < 2; i++)
                    if (n * 8 + i < from || n * 8 + i > to) s[n][2 * row + i] = -INFINITY;
        }
    }

    // As the left side of a product.
    __device__ __forceinline__ static void pair_up(const float (&s)[kTurnTiles][4], uint32_t (&weights)[kTurnKeys / 16][4]) {
        UNROLL for (int step = 0; step < kTurnKeys / 16; step++)
            WarpRows<T, Dim>::pair_up(s[2 * step], s[2 * step + 1], weights[step]);
    }

    __device__ __forceinline__ void store(const float (&sums)[Dim / 8][4], const Rows& rows, bool is_aligned_out) const {
        a.dtype == kBFloat16 ? store_as<bf16>(sums, rows, is_aligned_out) : store_as<fp16>(sums, rows, is_aligned_out);
    }

    // By way of the warp's rows of the queries, which all warps have read once they have left the last keys.
    template <typename Out>
    __device__ __forceinline__ void store_as(const float (&sums)[Dim / 8][4], const Rows& rows, bool is_aligned_out) const {
        const int last = item_of_keys(turns - 1), lane = int(threadIdx.x) % kWarpSize;
        wait_for_phase(shared.empty[last % kSlots], last / kSlots);
        Out* results = reinterpret_cast<Out*>(shared.queries);
        UNROLL for (int row = 0; row < 2; row++) {
            float total = rows.totals[row];
            UNROLL for (int mask = 1; mask < 4; mask *= 2) total += __shfl_xor_sync(kAllLanes, total, mask);
            const float factor = scale_of(a.v_scales, span.kv_head) / total;
            UNROLL for (int n = 0; n < Dim / 8; n++) {
                const int place = n / 8 * kQueryPanel + swizzled(lane_row() + 8 * row, n % 8 * 8 + lane % 4 * 2);
                store_whole(results + place, pair_of<Out>(sums[n][2 * row] * factor, sums[n][2 * row + 1] * factor));
            }
        }
        __syncwarp();
        const int column = lane % kChunks * 8;
        UNROLL for (int i = 0; i < kTileRows; i += kWarpSize / kChunks) {
            const int row = warp * kTileRows + i + lane / kChunks;
            if (row >= span.rows || column >= a.dim) continue;
            const Out* from = results + column / kGroupRow * kQueryPanel + swizzled(row, column % kGroupRow);
            Out* to = static_cast<Out*>(a.out) + (int64_t(token_of(row)) * a.heads + head_of(row)) * a.dim + column;
            if (is_aligned_out)
                store_whole(to, load_whole<uint4>(from));
            else
                UNROLL for (int j = 0; j < 8; j++) to[j] = from[j];
        }
    }
};

// Of a chunk's tile, the last one first, which sees most; false where the block has nothing to do.
template <int Groups>
__device__ bool find_group_span(const AttentionArgs& a, Span& span) {
    const int kv_heads = int(a.kv_heads), index = int(gridDim.x - 1 - blockIdx.x);
    span.kv_head = index % kv_heads;
    return find_tile(a, index / kv_heads, Groups * kGroupRows, span) && complete_span(a, Groups * kGroupRows, span);
}

template <typename T, int Dim, int Groups>
__global__ void __launch_bounds__(kGroupThreads<Groups>, 1)
    paged_attention_group_kernel(AttentionArgs a, bool aligned, bool is_aligned_out) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kWarps = Groups * kGroupWarps;
    Span span;
    if (!find_group_span<Groups>(a, span)) return;
    auto& shared = *reinterpret_cast<AttentionShared<T, Dim, Groups>*>(dynamic_shared());
    const AttentionGroup<T, Dim, Groups> block{{a, span}, shared};
    block.start_barriers();
    __syncthreads();
    // Of the registers that each thread of three warpgroups has, 168, those that bring need few.
    if (block.warp >= kWarps) {
        if constexpr (Groups > 1) give_registers<40>();
        return block.bring(block.warp - kWarps);
    }
    if constexpr (Groups > 1) take_registers<232>();
    block.load_queries(aligned);
    block.attend(is_aligned_out);
#endif
}
