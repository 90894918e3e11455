// Chunks of many rows on sm_90a, for caches of 16 bits and heads of up to 128: as the kernel of paged_attention.cu, with
// wgmma. One or two warpgroups have 64 rows each; one more brings keys and values, in stages of two tiles, which mbarriers
// say are full or empty. A stage's scores are one group of products; then its tiles follow each other as they do
// there, weights · values of one under way while the next one's weights are made, or the next stage's scores.
//
// Tiles, sections and steps of products are those of the other kernel, so a row differs only where wgmma rounds otherwise
// than mma.sync does inside of a step, which no document rules out: ``is_deterministic`` keeps to mma.sync.
#pragma once

#include "attention_rows.h"

constexpr int kGroupRows = 64, kGroupWarps = kGroupRows / kTileRows;
constexpr int kBringers = 4;  // warps
constexpr int kStageTiles = 2, kStageKeys = kStageTiles * kTileKeys;

template <int Groups>
constexpr int kGroupThreads = (Groups * kGroupWarps + kBringers) * kWarpSize;

// Keys and values lie in panels of 64 columns. Whole sums take the place of queries, which registers keep.
template <typename T, int Dim, int Groups>
struct AttentionShared {
    static constexpr int kStages = 4, kRows = Groups * kGroupRows, kPanel = kStageKeys * kGroupRow;
    struct Stage {
        T keys[Dim / kGroupRow * kPanel], values[Dim / kGroupRow * kPanel];
    } stages[kStages];
    union {
        T queries[kRows * SharedRows<T, Dim>::kStride];
        float whole[Groups * kGroupWarps][kTileRows * Dim];
    };
    Mbarrier full[kStages], empty[kStages];
};

template <typename T, int Dim, int Groups>
struct AttentionGroup : BlockRows {
    using Shared = AttentionShared<T, Dim, Groups>;
    using Stage = typename Shared::Stage;
    static constexpr int kStages = Shared::kStages, kPanel = Shared::kPanel;
    static constexpr int kAtOnce = 4;  // turns of a loop that are unrolled

    Shared& shared;
    // Of the first stage, and behind the last one's: as every lane knows them, or wgmma would wait for itself.
    int first = uniform(seen_from) / kStageKeys * kStageKeys, last = uniform(seen_to);

    __device__ __forceinline__ void start_barriers() const {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; stage++) {
                start_barrier(shared.full[stage], kBringers);
                start_barrier(shared.empty[stage], Groups * kGroupWarps);
            }
        }
    }

    // This warp has done what the barrier waits for.
    __device__ __forceinline__ void tell(Mbarrier& at) const {
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) arrive(at);
    }

    // What the which-th of the warps does that bring keys and values: a stage is told to be full once the next one has been
    // asked for.
    __device__ __forceinline__ void bring(int which) const {
        int stage = 0;
        KEEP_LOOP for (int base = first, turn = 0; base < last; base += kStageKeys, turn++) {
            stage = turn % kStages;
            if (turn >= kStages) wait_for_phase(shared.empty[stage], turn / kStages - 1);
            ask(shared.stages[stage], base, which);
            commit_copies();
            if (turn > 0) tell_full<1>((turn - 1) % kStages);
        }
        tell_full<0>(stage);
    }

    template <int Later>
    __device__ __forceinline__ void tell_full(int stage) const {
        wait_for_copies<Later>();
        show_to_products();
        tell(shared.full[stage]);
    }

    // Each lane looks for a position of its warp's, and brings 16 bytes of several.
    __device__ __forceinline__ void ask(Stage& to, int base, int which) const {
        constexpr int kChunks = Dim / 8, kKeys = kStageKeys / kBringers;
        static_assert(kKeys <= kWarpSize, "a lane looks for one position");
        const int lane = int(threadIdx.x) % kWarpSize, column = lane % kChunks * 8, begin = which * kKeys;
        const int64_t my_row = cache_row(base + begin + lane % kKeys);
        UNROLL_SOME for (int i = 0; i < kKeys; i += kWarpSize / kChunks) {
            const int key = i + lane / kChunks;
            const int64_t row = __shfl_sync(kAllLanes, my_row, key);
            const bool is_wanted = row >= 0 && column < a.dim;
            const int64_t place = is_wanted ? row * a.dim + column : 0;
            const int at = column / kGroupRow * kPanel + swizzled(begin + key, column % kGroupRow);
            copy_16_bytes(to.keys + at, static_cast<const T*>(a.k_cache) + place, is_wanted);
            copy_16_bytes(to.values + at, static_cast<const T*>(a.v_cache) + place, is_wanted);
        }
    }

    // What a warp with rows does.
    __device__ __forceinline__ void attend(const WarpQueries<T, Dim>& q, WholeRows<T, Dim>& whole) const {
        int positions[2];
        lane_positions(positions);
        const Scores how = scores();
        WarpRows<T, Dim> rows;
        rows.start_section();
        uint32_t weights[2][4] = {};
        KEEP_LOOP for (int base = first, turn = 0; base < last; base += kStageKeys, turn++) {
            const int stage = turn % kStages;
            const Stage& here = shared.stages[stage];
            float s[kStageKeys / 8][4];
            wait_for_phase(shared.full[stage], turn / kStages);
            begin_products(s);
            UNROLL for (int d = 0; d < Dim / 16; d++)
                multiply_group(s, q.kept[d], here.keys + d / 4 * kPanel, d % 4, d > 0);
            commit_products();
            wait_for_products<1>(rows.sums, weights);
            if (turn > 0) tell(shared.empty[(turn - 1) % kStages]);
            wait_for_products<0>(s, q.kept);
            UNROLL for (int tile = 0; tile < kStageTiles; tile++) {
                float keep[2];
                const int begin = tile * kTileKeys / 8;
                rows.weigh(s, begin, keep, base + tile * kTileKeys, positions, how);
                if (tile > 0) wait_for_products<0>(rows.sums, weights);
                rows.rescale(keep);
                UNROLL for (int half = 0; half < 2; half++)
                    rows.pair_up(s[begin + 2 * half], s[begin + 2 * half + 1], weights[half]);
                begin_products(rows.sums);
                UNROLL for (int half = 0; half < 2; half++)
                    multiply_group_rows(rows.sums, weights[half], here.values, 2 * tile + half, kPanel);
                commit_products();
            }
            if ((base + kStageKeys) % kSection == 0 || base + kStageKeys >= last) {
                wait_for_products<0>(rows.sums, weights);
                rows.finish_section();
                whole.add(rows);
                rows.start_section();
            }
        }
    }
};

template <typename T, int Dim, int Groups>
__global__ void __launch_bounds__(kGroupThreads<Groups>, 1) paged_attention_group_kernel(AttentionArgs a, bool aligned) {
    begin_kernel();
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kWarps = Groups * kGroupWarps;
    Span span;
    if (!find_span<kWarps>(a, span)) return;
    auto& shared = *reinterpret_cast<AttentionShared<T, Dim, Groups>*>(dynamic_shared());
    const AttentionGroup<T, Dim, Groups> block{{a, span}, shared};
    const int warp = uniform(int(threadIdx.x) / kWarpSize);
    block.start_barriers();
    block.template load_queries<T, Dim, kWarps * kTileRows, kGroupThreads<Groups>>(shared.queries, aligned);
    __syncthreads();
    WarpQueries<T, Dim> queries;
    queries.rows = {shared.queries + warp * kTileRows * SharedRows<T, Dim>::kStride};
    if (warp < kWarps) queries.keep();
    __syncthreads();
    // Of the registers that each thread of three warpgroups has, 168, those that bring need few.
    constexpr bool kIsWide = Dim > 64 && Groups > 1;
    if (warp >= kWarps) {
        if constexpr (kIsWide) give_registers<40>();
        return block.bring(warp - kWarps);
    }
    if constexpr (kIsWide) take_registers<232>();
    WholeRows<T, Dim> whole{shared.whole[warp], {}};
    whole.start();
    block.attend(queries, whole);
    block.store(whole);
#endif
}
