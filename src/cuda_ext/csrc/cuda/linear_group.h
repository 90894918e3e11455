// The product for many rows on sm_90a, included by linear_tile.h: as linear_many.h, with wgmma. A block is two
// warpgroups; each of its eight warps has 16 outputs, and their weights in registers as they do for few rows. Rows of x
// go through registers into shared memory, because a step of a product takes its 16 inputs from all over a tile
// (quantised.h): a pair of elements lies where its step and lane look for it. Two tiles take turns there, and the next
// but one is on its way in registers.
//
// Steps, groups and turns are those of the other two kernels, so sums differ only where wgmma rounds otherwise than
// mma.sync does inside of a step, which no document rules out: ``is_deterministic`` keeps to mma.sync.
#pragma once

constexpr int kGroupOutputs = kLinearWarps * kTileOutputs;

// Where the tile's input goes: column_of(run, input_of(run, step, t, j)) is 16 · step + 2t + j % 2 + 8 · (j / 2).
__host__ __device__ constexpr int column_of(int run, int input) {
    const int span = 4 * run, step = input / span * (run / 4) + input % run / 4;
    return 16 * step + input % span / run * 2 + input % 2 + input % 4 / 2 * 8;
}

template <typename Weight, int Rows>
struct GroupShared {
    typename Weight::Element x[2][Rows * kGroupRow];
    float of_x[Weight::kGroups + 1][Rows];
    union {
        float totals[Rows / 8][4][kLinearThreads];  // of the turns before: each thread's own
        float out[Rows][kGroupOutputs + 4];         // rows begin in other banks
    };
};

// Rows · 64 elements of x in registers, on their way to shared memory.
template <typename T, int Run, int Rows>
struct StagedRows {
    static constexpr int kChunks = Rows * 8 / kLinearThreads;  // of eight inputs
    uint4 chunks[kChunks];

    // Zeros beyond the last row and input.
    __device__ __forceinline__ void ask(const LinearRows& a, int64_t first_row, int64_t tile) {
        UNROLL for (int k = 0; k < kChunks; k++) {
            const int i = int(threadIdx.x) + k * kLinearThreads;
            const int64_t row = first_row + i / 8, input = tile * kTileInputs + i % 8 * 8;
            const bool is_wanted = tile >= 0 && row < a.rows && input < a.inputs;
            const T* from = static_cast<const T*>(a.x) + row * a.row_stride + input;
            chunks[k] = is_wanted ? load_whole<uint4>(from) : uint4{};
        }
    }

    __device__ __forceinline__ void put(T* to) const {
        UNROLL for (int k = 0; k < kChunks; k++) {
            const int i = int(threadIdx.x) + k * kLinearThreads, row = i / 8;
            const uint32_t pairs[4] = {chunks[k].x, chunks[k].y, chunks[k].z, chunks[k].w};
            UNROLL for (int p = 0; p < 4; p++)
                store_whole(to + swizzled(row, column_of(Run, i % 8 * 8 + 2 * p)), pairs[p]);
        }
    }
};

// The sums of each group of x, a warp some rows: as sum_groups adds them.
template <typename Weight, int Rows>
__device__ __forceinline__ void sum_rows(GroupShared<Weight, Rows>& shared, const typename Weight::Element* x) {
    const int lane = int(threadIdx.x % kWarpSize), g = lane / 4, t = lane % 4;
    for (int n = int(threadIdx.x / kWarpSize); n < Rows / 8; n += kLinearWarps) {
        uint32_t right[kSteps][2];
        float of_x[Weight::kGroups + 1][4];
        UNROLL for (int step = 0; step < kSteps; step++)
            UNROLL for (int half = 0; half < 2; half++)
                right[step][half] = load_whole<uint32_t>(x + swizzled(n * 8 + g, 16 * step + 8 * half + 2 * t));
        sum_groups<Weight>(right, of_x);
        if (g > 0) continue;  // each row of the product is the same
        UNROLL for (int group = 0; group < Weight::kGroups; group++)
            UNROLL for (int i = 0; i < 2; i++) shared.of_x[group][n * 8 + 2 * t + i] = of_x[group][i];
    }
}

template <typename Weight, int Rows>
__global__ void __launch_bounds__(kLinearThreads, 1) linear_group_kernel(LinearRows a, Weight weight) {
    begin_kernel();
    static_assert(Weight::kGroups == 0 || Weight::kGroups == Weight::kScales, "sums of x are of the scaled groups");
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using T = typename Weight::Element;
    constexpr int kTiles = Rows / 8;
    auto& shared = *reinterpret_cast<GroupShared<Weight, Rows>*>(dynamic_shared());
    const int lane = int(threadIdx.x % kWarpSize), warp = int(threadIdx.x / kWarpSize), g = lane / 4, t = lane % 4;
    const int64_t first_row = int64_t(blockIdx.x) * Rows, tiles = tiles_of(a.inputs);
    const int64_t first_output = int64_t(blockIdx.y) * kGroupOutputs, last_panel = (a.outputs - 1) / kTileOutputs;
    const int64_t my_panel = first_output / kTileOutputs + warp, panel = my_panel < last_panel ? my_panel : last_panel;

    float sums[kTiles][4] = {};
    TileWalk here{tiles, 0}, ahead{tiles, 0};
    StagedRows<T, Weight::kRun, Rows> staged;
    staged.ask(a, first_row, 0);
    staged.put(shared.x[0]);
    ahead.advance();
    staged.ask(a, first_row, ahead.tile);
    typename Weight::Tile next = weight.load(panel, 0);
    int stage = 0;
    KEEP_LOOP while (here.tile >= 0) {
        show_to_products();
        __syncthreads();
        const T* x = shared.x[stage];
        stage ^= 1;
        staged.put(shared.x[stage]);
        ahead.advance();
        staged.ask(a, first_row, ahead.tile);
        const typename Weight::Tile mine = next;
        uint32_t left[kSteps][4];
        weight.widen(mine, left);
        const bool ends_turn = here.ends_turn(), is_first_turn = here.tile % kTurns == 0;
        here.advance();
        if (here.tile >= 0) next = weight.load(panel, here.tile);
        if constexpr (Weight::kScales == 0) {
            begin_products(sums);
            UNROLL for (int step = 0; step < kSteps; step++) multiply_group(sums, left[step], x, step, true);
            commit_products();
            wait_for_products<0>(sums, left);
        } else {
            constexpr int kStepsOfGroup = kSteps / Weight::kScales;
            UNROLL for (int group = 0; group < Weight::kScales; group++) {
                float product[kTiles][4];
                begin_products(product);
                UNROLL for (int step = 0; step < kStepsOfGroup; step++)
                    multiply_group(product, left[group * kStepsOfGroup + step], x, group * kStepsOfGroup + step, step > 0);
                commit_products();
                if constexpr (Weight::kGroups > 0) {
                    if (group == 0) {
                        sum_rows<Weight, Rows>(shared, x);
                        __syncthreads();
                    }
                }
                wait_for_products<0>(product, left);
                UNROLL for (int n = 0; n < kTiles; n++) {
                    float of_x[4] = {};
                    if constexpr (Weight::kGroups > 0)
                        UNROLL for (int i = 0; i < 4; i++) of_x[i] = shared.of_x[group][n * 8 + 2 * t + i % 2];
                    weight.add_group(mine, group, product[n], of_x, sums[n]);
                }
            }
        }
        if (ends_turn) {
            UNROLL for (int n = 0; n < kTiles; n++)
                UNROLL for (int i = 0; i < 4; i++) {
                    float& total = shared.totals[n][i][threadIdx.x];
                    total = is_first_turn ? sums[n][i] : total + sums[n][i];
                    sums[n][i] = 0.0f;
                }
        }
    }
    const float nothing = tiles < kTurns ? 0.0f : -0.0f;  // turns without a tile
    UNROLL for (int n = 0; n < kTiles; n++)
        UNROLL for (int i = 0; i < 4; i++) sums[n][i] = shared.totals[n][i][threadIdx.x] + nothing;
    __syncthreads();
    UNROLL for (int n = 0; n < kTiles; n++)
        UNROLL for (int i = 0; i < 4; i++)
            shared.out[n * 8 + 2 * t + i % 2][warp * kTileOutputs + g + i / 2 * 8] = sums[n][i];
    __syncthreads();
    for (int i = int(threadIdx.x); i < Rows * kGroupOutputs; i += kLinearThreads) {
        const int row = i / kGroupOutputs, output = i % kGroupOutputs;
        store_sum<T>(a, first_row + row, first_output + output, shared.out[row][output]);
    }
#else
    (void)a, (void)weight;
#endif
}

template <int Rows, typename Weight>
int start_group(const char* name, const LinearRows& a, const Weight& weight, dim3 grid, void* stream) {
    constexpr size_t kBytes = sizeof(GroupShared<Weight, Rows>);
    return launch(name, linear_group_kernel<Weight, Rows>, grid, kLinearThreads, kBytes, stream, a, weight);
}

// Blocks of 64 rows where those of 128 would leave processors without one, or take more registers than there are.
template <typename Weight>
int start_group(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    const auto grid = [&a](int64_t rows) {
        return dim3(unsigned((a.rows + rows - 1) / rows), unsigned((a.outputs + kGroupOutputs - 1) / kGroupOutputs));
    };
    if constexpr (Weight::kGroups <= 2) {
        const dim3 large = grid(128);
        if (large.x * large.y >= unsigned(chip().processors)) return start_group<128>(name, a, weight, large, stream);
    }
    return start_group<64>(name, a, weight, grid(64), stream);
}
