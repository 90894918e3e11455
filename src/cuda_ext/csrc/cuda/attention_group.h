// Chunks of many rows on sm_90a, with wgmma. One or two warpgroups have 64 rows each; one more brings their queries, and
// tiles of keys and of values by turns into a ring of slots, which mbarriers say are full or empty. A processor has one
// block, which does one span of rows after the other, those that see most first; what the next one needs comes while the
// last one's results are made. Tiles of an fp8 cache come as they are, and those who brought them widen them into the
// ring. As in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), weights · values of one tile are under way together
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

// All but raw tiles lie in panels of 64 columns, also the results, on their way out.
template <typename Cache, int Dim, int Groups>
struct AttentionShared {
    using T = ElementOf<Cache>;
    static constexpr bool kWidens = std::is_same_v<Cache, fp8>;
    static constexpr int kTurnKeys = Dim > 128 ? 64 : 128;  // positions of a tile
    static constexpr int kSlots = Dim <= 64 ? 8 : Dim > 128 && kWidens ? 3 : 4, kPanels = Dim / kGroupRow;
    static constexpr int kQuerySets = Dim > 128 || (Dim > 64 && kWidens) ? 1 : 2;  // by turns, a span each
    static constexpr int kRawItems = kWidens ? 3 : 0, kRawItem = kTurnKeys * Dim / 16;
    static constexpr int kPanel = kTurnKeys * kGroupRow, kQueryPanel = Groups * kGroupRows * kGroupRow;
    T slots[kSlots][kPanels * kPanel];
    T queries[kQuerySets][kPanels * kQueryPanel];
    uint16_t results[Groups * kGroupWarps][kTileRows * kGroupRow];
    uint4 raw[kRawItems * kRawItem + 1];
    Span spans[kQuerySets + 1];  // by turns; without rows behind the last one
    Mbarrier full[kSlots], empty[kSlots];
    Mbarrier read[kQuerySets], turns[Groups];  // queries are done with; a warpgroup may multiply
};

// Of a block's next span; stripe: how many it has had. They are dealt out to the blocks there and back.
template <int Groups>
__device__ bool find_group_span(const AttentionArgs& a, int stripe, Span& span) {
    const int blocks = int(gridDim.x), block = int(blockIdx.x), kv_heads = int(a.kv_heads);
    const int index = stripe * blocks + (stripe % 2 == 0 ? block : blocks - 1 - block);
    span.kv_head = index % kv_heads;
    return find_tile<true>(a, index / kv_heads, Groups * kGroupRows, span);
}

// One span of rows.
template <typename Cache, int Dim, int Groups>
struct AttentionGroup : BlockRows {
    using Shared = AttentionShared<Cache, Dim, Groups>;
    using T = ElementOf<Cache>;
    static constexpr bool kWidens = Shared::kWidens;
    static constexpr int kTurnKeys = Shared::kTurnKeys, kTurnTiles = kTurnKeys / 8, kWarpKeys = kTurnKeys / kBringers;
    static constexpr int kSlots = Shared::kSlots, kPanel = Shared::kPanel, kQueryPanel = Shared::kQueryPanel;
    static constexpr int kSpans = Shared::kQuerySets + 1, kChunks = Dim / 8;
    static constexpr int kOfChunk = 16 / int(sizeof(Cache)), kCacheChunks = Dim / kOfChunk;
    static_assert(kWarpKeys <= kWarpSize, "a lane that brings looks for one position of a tile");
    static constexpr int kAtOnce = Dim > 128 ? 1 : 4;  // turns of a loop that are unrolled

    Shared& shared;
    // How many spans and tiles this block has had.
    int spans_before, turns_before;
    int warp = uniform(int(threadIdx.x) / kWarpSize), warpgroup = warp / kGroupWarps;
    // The first tile's first position, and how many tiles: as every lane knows them, or wgmma would wait for itself.
    int first = uniform(seen_from) / kTurnKeys * kTurnKeys;
    int turns = uniform((seen_to - first + kTurnKeys - 1) / kTurnKeys);

    // This warp has done what the barrier waits for.
    __device__ __forceinline__ static void tell(Mbarrier& at) {
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) arrive(at);
    }

    // The order of what is brought: keys 0, keys 1, values 0, keys 2, values 1, …
    __device__ __forceinline__ int item_of_keys(int turn) const {
        return 2 * turns_before + (turn == 0 ? 0 : 2 * turn - 1);
    }
    __device__ __forceinline__ int item_of_values(int turn) const {
        return 2 * turns_before + (turn + 1 < turns ? 2 * turn + 2 : 2 * turn + 1);
    }

    // What the which-th of the warps does that bring keys and values. A lane looks for one position of each tile, and
    // its block's number is asked for a turn ahead.
    __device__ __forceinline__ void bring(int which, bool aligned) const {
        int position = first + which * kWarpKeys + int(threadIdx.x) % kWarpKeys, block = block_of(position);
        uint32_t values = kNowhere;
        KEEP_LOOP for (int turn = 0; turn < turns; turn++, position += kTurnKeys) {
            const uint32_t keys = place_of(position, block);
            block = block_of(position + kTurnKeys);
            bring_item(item_of_keys(turn), a.k_cache, keys, which);
            if (turn == 0)
                bring_queries(which, aligned);
            else
                bring_item(item_of_values(turn - 1), a.v_cache, values, which);
            values = keys;
        }
        bring_item(item_of_values(turns - 1), a.v_cache, values, which);
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
            return uint32_t(((int64_t(block) * a.kv_heads + span.kv_head) * block_size + position % block_size) *
                            (a.dim / kOfChunk));
        atomicCAS(a.fault, kOk, kBlockOutside);
        return kNowhere;
    }

    // An item is told to be there once the next one has been asked for, one to widen two later.
    __device__ __forceinline__ void bring_item(int item, const void* cache, uint32_t my_place, int which) const {
        if constexpr (kWidens) {
            ask(item, cache, my_place, which);
            if (item < Shared::kRawItems - 1) return;
            wait_for_copies<Shared::kRawItems - 1>();
            widen(shared, item - Shared::kRawItems + 1, which);
        } else {
            wait_until_empty(shared, item);
            ask(item, cache, my_place, which);
            if (item > 0) tell_full<1>(shared, item - 1);
        }
    }

    // The last items of all, of which there are ``items``.
    __device__ __forceinline__ static void finish_items(Shared& shared, int items, int which) {
        if constexpr (kWidens) {
            wait_for_copies<0>();
            for (int item = items - Shared::kRawItems + 1; item < items; item++) widen(shared, item, which);
        } else {
            tell_full<0>(shared, items - 1);
        }
    }

    __device__ __forceinline__ static void wait_until_empty(Shared& shared, int item) {
        if (item >= kSlots) wait_for_phase(shared.empty[item % kSlots], item / kSlots - 1);
    }

    __device__ __forceinline__ void ask(int item, const void* cache, uint32_t my_place, int which) const {
        const int lane = made_here(int(threadIdx.x) % kWarpSize);
        if constexpr (kWidens) {
            uint4* to = raw_of(shared, item) + which * kWarpKeys * kCacheChunks + lane;
            const auto place = [=](int row, int) { return to + row * kCacheChunks; };
            copy_rows<kWarpKeys, kCacheChunks>(lane, cache, my_place, place);
        } else {
            copy_swizzled<kWarpKeys>(lane, place_in_slot(shared, item, which * kWarpKeys, 0), kPanel, cache, my_place);
        }
        commit_copies();
    }

    // Into rows that begin at a multiple of eight.
    template <int Rows>
    __device__ __forceinline__ void copy_swizzled(int lane, T* to, int panel, const void* from,
                                                  uint32_t my_place) const {
        const int column = lane % kChunks * 8, first_row = lane / kChunks;
        to += column / kGroupRow * panel;
        copy_rows<Rows, kChunks>(lane, from, my_place, [=](int row, int within) {
            return to + (row - within) * kGroupRow + swizzled(within + first_row, column % kGroupRow);
        });
    }

    // Each lane knows the place of one row, in 16 bytes, or kNowhere, which is zeros; it copies 16 bytes of several
    // rows. to(row, within): where those of row + lane / Chunks belong, ``within`` being row % 8.
    template <int Rows, int Chunks, typename To>
    __device__ __forceinline__ void copy_rows(int lane, const void* from, uint32_t my_place, const To& to) const {
        constexpr int kRowsAtOnce = kWarpSize / Chunks;
        const int chunk = lane % Chunks;
        const bool is_inside = chunk < int(a.dim) * Chunks / Dim;
        const uint4* first = static_cast<const uint4*>(from) + (is_inside ? chunk : 0);
        const auto copy_all = [&](const auto& is_there) {
            UNROLL_SOME for (int within = 0; within < 8; within += kRowsAtOnce)
                UNROLL for (int row = within; row < Rows; row += 8) {
                    const uint32_t place = __shfl_sync(kAllLanes, my_place, row + lane / Chunks);
                    const bool is_wanted = is_inside && is_there(place);
                    copy_16_bytes(to(row, within), first + (is_there(place) ? place : 0), is_wanted);
                }
        };
        if (__ballot_sync(kAllLanes, lane < Rows && my_place == kNowhere))
            copy_all([](uint32_t place) { return place != kNowhere; });
        else
            copy_all([](uint32_t) { return true; });
    }

    __device__ __forceinline__ static uint4* raw_of(Shared& shared, int item) {
        return shared.raw + item % Shared::kRawItems * Shared::kRawItem;
    }

    __device__ __forceinline__ static T* place_in_slot(Shared& shared, int item, int key, int column) {
        return shared.slots[item % kSlots] + column / kGroupRow * kPanel + swizzled(key, column % kGroupRow);
    }

    // What this lane has copied, which is there.
    __device__ __forceinline__ static void widen(Shared& shared, int item, int which) {
        const int lane = made_here(int(threadIdx.x) % kWarpSize), column = lane % kCacheChunks * kOfChunk;
        wait_until_empty(shared, item);
        UNROLL_SOME for (int i = 0; i < kWarpKeys; i += kWarpSize / kCacheChunks) {
            const int key = which * kWarpKeys + i + lane / kCacheChunks;
            const uint4 raw = raw_of(shared, item)[key * kCacheChunks + column / kOfChunk];
            store_whole(place_in_slot(shared, item, key, column), widened_eight({raw.x, raw.y}));
            store_whole(place_in_slot(shared, item, key, column + 8), widened_eight({raw.z, raw.w}));
        }
        show_to_products();
        tell(shared.full[item % kSlots]);
    }

    template <int Later>
    __device__ __forceinline__ static void tell_full(Shared& shared, int item) {
        wait_for_copies<Later>();
        show_to_products();
        tell(shared.full[item % kSlots]);
    }

    __device__ __forceinline__ T* queries() const { return shared.queries[spans_before % Shared::kQuerySets]; }

    // They are there when the first keys are told to be. Zeros beyond the last row and dim.
    __device__ __forceinline__ void bring_queries(int which, bool aligned) const {
        constexpr int kSets = Shared::kQuerySets;
        if (spans_before >= kSets) wait_for_phase(shared.read[spans_before % kSets], spans_before / kSets - 1);
        a.dtype == kBFloat16 ? bring_queries_of<bf16>(which, aligned) : bring_queries_of<fp16>(which, aligned);
        commit_copies();
    }

    template <typename Q>
    __device__ __forceinline__ void bring_queries_of(int which, bool aligned) const {
        constexpr int kRows = Groups * kGroupRows / kBringers;  // of this warp
        const int lane = made_here(int(threadIdx.x) % kWarpSize), my_row = which * kRows + lane % kRows;
        const int64_t my_first = token_of(my_row) * a.q_token_stride + head_of(my_row) * a.q_head_stride;
        T* to = queries() + which * kRows * kGroupRow;
        if (std::is_same_v<Q, T> && aligned)
            return copy_swizzled<kRows>(lane, to, kQueryPanel, a.q,
                                        my_row < span.rows ? uint32_t(my_first / 8) : kNowhere);
        KEEP_LOOP for (int i = lane; i < kRows * kChunks; i += kWarpSize) {
            const int row = i / kChunks, column = i % kChunks * 8;
            const int64_t first = __shfl_sync(kAllLanes, my_first, row);
            float eight[8] = {};
            if (which * kRows + row < span.rows && column < a.dim)
                load_eight(eight, static_cast<const Q*>(a.q) + first + column, 8, aligned);
            store_eight(to + column / kGroupRow * kQueryPanel + swizzled(row, column % kGroupRow), eight, 8, true);
        }
    }

    // What a lane knows of its two rows, of each of which it has 2t and 2t + 1 of eight columns: the positions that they
    // see, and the sums of their weights relative to a peak, of which ``totals`` are of this lane's columns.
    struct Rows {
        int from[2], to[2];
        float peaks[2] = {-INFINITY, -INFINITY}, totals[2] = {};
    };

    __device__ __forceinline__ int last_row_or(int row) const { return row < span.rows ? row : span.rows - 1; }

    // What a warp with rows does once the first keys are there.
    __device__ __forceinline__ void attend(bool is_aligned_out) const {
        Rows rows;
        UNROLL for (int i = 0; i < 2; i++) {
            rows.to[i] = position_of(last_row_or(lane_row() + 8 * i));
            rows.from[i] = a.window > 0 ? rows.to[i] - int(a.window) + 1 : 0;
        }
        const Scores how = scores();
        float sums[Dim / 8][4] = {}, s[kTurnTiles][4], keep[2];
        uint32_t weights[kTurnKeys / 16][4];
        take_turn(0);
        multiply_keys(s, 0);
        end_turn();
        wait_for_products<0>(s);
        leave_keys(0);
        weigh(s, 0, rows, how, keep);
        pair_up(s, weights);
        if (turns > 1) wait_for_keys(1);
        KEEP_LOOP for (int turn = 1; turn < turns; turn++) {
            take_turn(turn);
            multiply_keys(s, turn);
            add_values(sums, weights, turn - 1);
            end_turn();
            wait_for_products<1>(s);
            leave_keys(turn);
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
        tell(shared.empty[item_of_values(turns - 1) % kSlots]);
        store(sums, rows, is_aligned_out);
    }

    // The first warpgroup multiplies first, then they take turns.
    __device__ __forceinline__ void take_turn(int turn) const {
        const int before = turns_before + turn;
        if constexpr (Groups > 1)
            if (warpgroup > 0 || before > 0) wait_for_phase(shared.turns[warpgroup], before - 1 + warpgroup);
    }
    __device__ __forceinline__ void end_turn() const {
        if constexpr (Groups > 1) tell(shared.turns[1 - warpgroup]);
    }

    __device__ __forceinline__ void leave_keys(int turn) const {
        tell(shared.empty[item_of_keys(turn) % kSlots]);
        if (turn + 1 == turns) tell(shared.read[spans_before % Shared::kQuerySets]);
    }

    __device__ __forceinline__ void wait_for_keys(int turn) const {
        const int item = item_of_keys(turn);
        wait_for_phase(shared.full[item % kSlots], item / kSlots);
    }

    __device__ __forceinline__ void multiply_keys(float (&s)[kTurnTiles][4], int turn) const {
        const int slot = item_of_keys(turn) % kSlots;
        const T* mine = queries() + warpgroup * kGroupRows * kGroupRow;
        begin_products(s);
        UNROLL for (int d = 0; d < Dim / 16; d++)
            multiply_group_shared(s, mine + d / 4 * kQueryPanel, shared.slots[slot] + d / 4 * kPanel, d % 4, d > 0);
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
    __device__ __forceinline__ static void pair_up(const float (&s)[kTurnTiles][4],
                                                   uint32_t (&weights)[kTurnKeys / 16][4]) {
        UNROLL for (int step = 0; step < kTurnKeys / 16; step++)
            WarpRows<T, Dim>::pair_up(s[2 * step], s[2 * step + 1], weights[step]);
    }

    __device__ __forceinline__ void store(const float (&sums)[Dim / 8][4], const Rows& rows, bool is_aligned_out) const {
        a.dtype == kBFloat16 ? store_as<bf16>(sums, rows, is_aligned_out) : store_as<fp16>(sums, rows, is_aligned_out);
    }

    // By way of the warp's part of shared memory, 64 columns at a time.
    template <typename Out>
    __device__ __forceinline__ void store_as(const float (&sums)[Dim / 8][4], const Rows& rows,
                                             bool is_aligned_out) const {
        constexpr int kOfRow = kGroupRow / 8, kRowsAtOnce = kWarpSize / kOfRow, kTimes = kTileRows / kRowsAtOnce;
        const int lane = made_here(int(threadIdx.x) % kWarpSize);
        float factors[2];
        UNROLL for (int row = 0; row < 2; row++) {
            float total = rows.totals[row];
            UNROLL for (int mask = 1; mask < 4; mask *= 2) total += __shfl_xor_sync(kAllLanes, total, mask);
            factors[row] = scale_of(a.v_scales, span.kv_head) / total;
        }
        Out *results = reinterpret_cast<Out*>(shared.results[warp]), *to[kTimes];
        UNROLL for (int i = 0; i < kTimes; i++) {
            const int row = warp * kTileRows + i * kRowsAtOnce + lane / kOfRow;
            const int64_t place = (int64_t(token_of(row)) * a.heads + head_of(row)) * a.dim + lane % kOfRow * 8;
            to[i] = row < span.rows ? static_cast<Out*>(a.out) + place : nullptr;
        }
        UNROLL for (int panel = 0; panel < Dim / kGroupRow; panel++) {
            UNROLL for (int n = 0; n < kOfRow; n++)
                UNROLL for (int row = 0; row < 2; row++) {
                    const float(&pair)[4] = sums[panel * kOfRow + n];
                    const int place = swizzled(lane / 4 + 8 * row, n * 8 + lane % 4 * 2);
                    store_whole(results + place,
                                pair_of<Out>(pair[2 * row] * factors[row], pair[2 * row + 1] * factors[row]));
                }
            __syncwarp();
            const int column = panel * kGroupRow + lane % kOfRow * 8;
            UNROLL for (int i = 0; i < kTimes; i++) {
                if (!to[i] || column >= a.dim) continue;
                const Out* from = results + swizzled(i * kRowsAtOnce + lane / kOfRow, lane % kOfRow * 8);
                if (is_aligned_out)
                    store_whole(to[i] + panel * kGroupRow, load_whole<uint4>(from));
                else
                    UNROLL for (int j = 0; j < 8; j++) to[i][panel * kGroupRow + j] = from[j];
            }
            __syncwarp();
        }
    }
};

// What the which-th of the warps does that bring keys and values: it goes through the block's spans, and tells them.
template <typename Cache, int Dim, int Groups>
__device__ __forceinline__ void bring_spans(const AttentionArgs& a, AttentionShared<Cache, Dim, Groups>& shared,
                                            int which, bool aligned) {
    using Block = AttentionGroup<Cache, Dim, Groups>;
    const bool tells = which == 0 && threadIdx.x % kWarpSize == 0;
    Span span;
    int spans = 0, turns = 0;
    KEEP_LOOP for (int stripe = 0; uniform(find_group_span<Groups>(a, stripe, span)); stripe++) {
        if (!uniform(complete_span(a, Groups * kGroupRows, span))) continue;
        const Block block{{a, span}, shared, uniform(spans), uniform(turns)};
        if (tells) shared.spans[spans % Block::kSpans] = span;
        block.bring(which, aligned);
        spans++, turns += block.turns;
    }
    if (turns > 0) Block::finish_items(shared, 2 * turns, which);
    if (tells) shared.spans[spans % Block::kSpans].rows = 0;
    Block::wait_until_empty(shared, 2 * turns);
    Block::tell(shared.full[2 * turns % Block::kSlots]);
}

// What the other warps do.
template <typename Cache, int Dim, int Groups>
__device__ __forceinline__ void attend_to_spans(const AttentionArgs& a, AttentionShared<Cache, Dim, Groups>& shared,
                                                bool is_aligned_out) {
    using Block = AttentionGroup<Cache, Dim, Groups>;
    int turns = 0;
    KEEP_LOOP for (int spans = 0;; spans++) {
        wait_for_phase(shared.full[2 * turns % Block::kSlots], 2 * turns / Block::kSlots);
        const Span span = shared.spans[spans % Block::kSpans];
        if (uniform(span.rows) == 0) break;
        const Block block{{a, span}, shared, spans, uniform(turns)};
        block.attend(is_aligned_out);
        turns += block.turns;
    }
}

template <typename Cache, int Dim, int Groups>
__global__ void __launch_bounds__(kGroupThreads<Groups>, 1)
    paged_attention_group_kernel(AttentionArgs a, bool aligned, bool is_aligned_out) {
    begin_kernel();
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kWarps = Groups * kGroupWarps;
    using Shared = AttentionShared<Cache, Dim, Groups>;
    auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < Shared::kSlots; slot++) {
            start_barrier(shared.full[slot], kBringers);
            start_barrier(shared.empty[slot], kWarps);
        }
        for (auto& read : shared.read) start_barrier(read, kWarps);
        for (int i = 0; i < Groups; i++) start_barrier(shared.turns[i], kGroupWarps);
    }
    __syncthreads();
    const int warp = uniform(int(threadIdx.x) / kWarpSize);
    // Of the registers that each thread of three warpgroups has, 168, those that bring need few.
    constexpr int kOfBringers = Dim > 128 ? 56 : 72, kOfOthers = (3 * 168 - kOfBringers) / 2;
    if (warp >= kWarps) {
        if constexpr (Groups > 1) give_registers<kOfBringers>();
        bring_spans<Cache, Dim, Groups>(a, shared, warp - kWarps, aligned);
    } else {
        if constexpr (Groups > 1) take_registers<kOfOthers>();
        attend_to_spans<Cache, Dim, Groups>(a, shared, is_aligned_out);
    }
#endif
}
