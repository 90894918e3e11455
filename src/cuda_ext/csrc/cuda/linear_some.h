// The product for 17 to 64 rows on sm_90a, included by linear_tile.h, with wgmma. A block is two warpgroups; each of its
// eight warps has 16 outputs, whose weights come by cp.async and go through registers. Rows of x go through registers into
// shared memory, because a step of a product takes its 16 inputs from all over a tile (quantised.h): a pair of elements
// lies where its step and lane look for it. One tile is multiplied, the next one is there already, so that its groups are
// summed up, and the one behind it is put in its place.
//
// A cluster along z, of one block or more, shares the tiles out; its blocks' sums are added up in order. Tiles are added up
// one after the other, not in turns as the other kernels do, and wgmma may round otherwise than mma.sync does inside of a
// step: ``is_deterministic`` keeps to those.
#pragma once

constexpr int kSomeOutputs = kLinearWarps * kTileOutputs;
constexpr int kRowStages = 3;
constexpr int kTilesOfPart = 16;  // that plain weights are summed up by before they are added to the rest
constexpr unsigned kMostSharers = 8, kBlocksOfProcessor = 2;

template <typename Weight, int Rows>
struct SomeShared {
    static constexpr int kStages = Weight::kSlotBytes <= 1024 ? 6 : 4;  // of weights
    struct Stages {
        typename Weight::Element x[kRowStages][Rows * kGroupRow];
        unsigned char weights[kStages][kLinearWarps][Weight::kSlotBytes];
        float of_x[2][Weight::kGroups / 2 + 1][Rows][4];
    };
    union {
        Stages stages;
        float out[Rows][kSomeOutputs + 4];  // rows begin in other banks
    };
};

// Rows · 64 elements of x in registers, on their way to shared memory: of every kRowsApart-th row eight inputs.
template <typename T, int Run, int Rows>
struct SomeRows {
    static constexpr int kRowsApart = kLinearThreads / 8, kChunks = Rows / kRowsApart;
    uint4 chunks[kChunks];

    // Zeros beyond the last row, input and tile.
    __device__ __forceinline__ void ask(const LinearRows& a, int first_row, int tile, int end) {
        const int row = first_row + int(threadIdx.x) / 8, input = tile * kTileInputs + int(threadIdx.x) % 8 * 8;
        const T* from = static_cast<const T*>(a.x) + row * a.row_stride + input;
        UNROLL for (int k = 0; k < kChunks; k++) {
            const bool is_wanted = tile < end && row + k * kRowsApart < int(a.rows) && input < int(a.inputs);
            chunks[k] = is_wanted ? load_whole<uint4>(from + k * kRowsApart * a.row_stride) : uint4{};
        }
    }

    __device__ __forceinline__ void put(T* to) const {
        static_assert(kRowsApart % 8 == 0, "swizzled alike");
        UNROLL for (int p = 0; p < 4; p++) {
            const int column = column_of(Run, int(threadIdx.x) % 8 * 8 + 2 * p);
            T* place = to + swizzled(int(threadIdx.x) / 8, column);
            UNROLL for (int k = 0; k < kChunks; k++) {
                const uint32_t pairs[4] = {chunks[k].x, chunks[k].y, chunks[k].z, chunks[k].w};
                store_whole(place + k * kRowsApart * kGroupRow, pairs[p]);
            }
        }
    }
};

// The sums of each group of x, a warp some rows, of two groups side by side: what tf32 holds of a sum, and of the rest.
template <typename Weight, int Rows>
__device__ __forceinline__ void sum_some_rows(float (&to)[Weight::kGroups / 2 + 1][Rows][4],
                                         const typename Weight::Element* x) {
    if constexpr (Weight::kGroups > 0) {
        const int lane = int(threadIdx.x % kWarpSize), warp = uniform(int(threadIdx.x / kWarpSize)), t = lane % 4;
        UNROLL for (int k = 0; k < (Rows / 8 + kLinearWarps - 1) / kLinearWarps; k++) {
            const int n = warp + k * kLinearWarps;
            if (n >= Rows / 8) break;
            uint32_t right[kSteps][2];
            float of_x[Weight::kGroups + 1][4];
            UNROLL for (int step = 0; step < kSteps; step += 2) {
                uint32_t four[4];
                load_matrices(four, x + n * 8 * kGroupRow + swizzled(lane % 8, 16 * step + lane / 8 * 8));
                right[step][0] = four[0], right[step][1] = four[1];
                right[step + 1][0] = four[2], right[step + 1][1] = four[3];
            }
            sum_groups<Weight>(right, of_x);
            if (lane >= 4) continue;  // each row of the product is the same
            UNROLL for (int pair = 0; pair < Weight::kGroups / 2; pair++)
                UNROLL for (int i = 0; i < 2; i++) {
                    float4 parts;
                    const float first = of_x[2 * pair][i], second = of_x[2 * pair + 1][i];
                    parts.x = narrowed(first), parts.y = first - parts.x;
                    parts.z = narrowed(second), parts.w = second - parts.z;
                    store_whole(to[pair][n * 8 + 2 * t + i], parts);
                }
        }
    }
}

template <typename Weight, int Rows>
__global__ void __launch_bounds__(kLinearThreads, kBlocksOfProcessor)
    linear_some_kernel(LinearRows a, Weight weight) {
    begin_kernel();
    static_assert(Weight::kGroups == 0 || Weight::kGroups == Weight::kScales, "sums of x are of the scaled groups");
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using T = typename Weight::Element;
    using Shared = SomeShared<Weight, Rows>;
    constexpr int kTiles = Rows / 8, kStages = Shared::kStages;
    auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    auto& stages = shared.stages;
    const int lane = int(threadIdx.x % kWarpSize), warp = uniform(int(threadIdx.x / kWarpSize)), g = lane / 4, t = lane % 4;
    const int first_row = int(blockIdx.x) * Rows;
    const int64_t first_output = int64_t(blockIdx.y) * kSomeOutputs;
    const int last_panel = int((a.outputs - 1) / kTileOutputs), my_panel = int(blockIdx.y) * kLinearWarps + warp;
    const int panel = my_panel < last_panel ? my_panel : last_panel;
    const int tiles = int(tiles_of(a.inputs)), blocks = int(gridDim.z), rank = int(blockIdx.z);
    const int begin = rank * tiles / blocks, end = (rank + 1) * tiles / blocks;

    const auto fetch = [&](int tile, int stage) {
        if (tile < end) weight.fetch(panel, tile, stages.weights[stage][warp]);
        commit_copies();
    };
    UNROLL for (int i = 0; i + 1 < kStages; i++) fetch(begin + i, i);
    SomeRows<T, Weight::kRun, Rows> staged;
    {
        SomeRows<T, Weight::kRun, Rows> first;
        first.ask(a, first_row, begin, end);
        staged.ask(a, first_row, begin + 1, end);
        first.put(stages.x[0]);
        staged.put(stages.x[1]);
    }
    staged.ask(a, first_row, begin + 2, end);
    if constexpr (Weight::kGroups > 0) {
        __syncthreads();
        sum_some_rows<Weight, Rows>(stages.of_x[0], stages.x[0]);
    }

    float sums[kTiles][4] = {}, product[kTiles][4] = {};
    int stage = 0, x_stage = 0;
    KEEP_LOOP for (int tile = begin; tile < end; tile++) {
        show_to_products();
        __syncthreads();
        const T* x = stages.x[x_stage];
        const int parity = (tile - begin) % 2;
        x_stage = x_stage + 1 < kRowStages ? x_stage + 1 : 0;
        sum_some_rows<Weight, Rows>(stages.of_x[parity ^ 1], stages.x[x_stage]);
        wait_for_copies<kStages - 2>();
        __syncwarp();
        const typename Weight::Tile mine = weight.take(stages.weights[stage][warp]);
        __syncwarp();
        fetch(tile + kStages - 1, stage > 0 ? stage - 1 : kStages - 1);
        stage = stage + 1 < kStages ? stage + 1 : 0;
        // While a product is under way.
        const auto bring_rows = [&] {
            staged.put(stages.x[x_stage + 1 < kRowStages ? x_stage + 1 : 0]);
            staged.ask(a, first_row, tile + 3, end);
        };
        uint32_t left[kSteps][4];
        weight.widen(mine, left);
        if constexpr (Weight::kScales == 0) {
            begin_products(product);
            UNROLL for (int step = 0; step < kSteps; step++) multiply_group(product, left[step], x, step, true);
            commit_products();
            bring_rows();
            wait_for_products<0>(product, left);
            if (tile % kTilesOfPart + 1 == kTilesOfPart || tile + 1 == end) {
                UNROLL for (int n = 0; n < kTiles; n++)
                    UNROLL for (int i = 0; i < 4; i++) {
                        sums[n][i] += product[n][i];
                        product[n][i] = 0.0f;
                    }
            }
        } else {
            constexpr int kStepsOfGroup = kSteps / Weight::kScales;
            UNROLL for (int group = 0; group < Weight::kScales; group++) {
                begin_products(product);
                UNROLL for (int step = 0; step < kStepsOfGroup; step++)
                    multiply_group(product, left[group * kStepsOfGroup + step], x, group * kStepsOfGroup + step, step > 0);
                commit_products();
                if (group == 0) bring_rows();
                wait_for_products<0>(product, left);
                UNROLL for (int n = 0; n < kTiles; n++) weight.scale_group(mine, group, product[n], sums[n]);
            }
            UNROLL for (int pair = 0; pair < Weight::kGroups / 2; pair++) {
                float offsets[2];
                weight.offsets_of(mine, pair, offsets);
                UNROLL for (int n = 0; n < kTiles; n++)
                    multiply_floats(sums[n], offsets, stages.of_x[parity][pair][n * 8 + g][t]);
            }
        }
    }
    __syncthreads();
    UNROLL for (int n = 0; n < kTiles; n++)
        UNROLL for (int i = 0; i < 4; i++)
            shared.out[n * 8 + 2 * t + i % 2][warp * kTileOutputs + g + i / 2 * 8] = sums[n][i];
    const bool is_alone = blocks == 1;
    if (is_alone)
        __syncthreads();
    else
        meet_cluster();
    for (int i = rank * kLinearThreads + int(threadIdx.x); i < Rows * kSomeOutputs; i += blocks * kLinearThreads) {
        const int row = i / kSomeOutputs, output = i % kSomeOutputs;
        const float* mine = &shared.out[row][output];
        float sum = is_alone ? *mine : *of_block(0, mine);
        for (int other = 1; other < blocks; other++) sum += *of_block(other, mine);
        store_sum<T>(a, first_row + row, first_output + output, sum);
    }
    if (!is_alone) meet_cluster();  // before a block's memory goes
#else
    (void)a, (void)weight;
#endif
}

template <int Rows, typename Weight>
int start_some(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    constexpr size_t kBytes = sizeof(SomeShared<Weight, Rows>);
    dim3 grid(unsigned((a.rows + Rows - 1) / Rows), unsigned((a.outputs + kSomeOutputs - 1) / kSomeOutputs));
    const auto tiles = unsigned(tiles_of(a.inputs));
    // Where there are fewer blocks than the chip can hold, several share out the inputs.
    while (grid.z < kMostSharers && grid.z * kTilesOfPart / 2 <= tiles &&
           grid.x * grid.y * grid.z * 2 <= kBlocksOfProcessor * unsigned(chip().processors))
        grid.z *= 2;
    return launch_clusters(name, linear_some_kernel<Weight, Rows>, grid, grid.z, kLinearThreads, kBytes, stream, a,
                           weight);
}

template <typename Weight>
int start_some(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    return a.rows <= 32 ? start_some<32>(name, a, weight, stream) : start_some<64>(name, a, weight, stream);
}
