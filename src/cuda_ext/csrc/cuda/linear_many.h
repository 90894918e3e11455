// The product for many rows, included by linear_tile.h. A block does 64 rows and, in each of its eight warps, kPanels · 16
// outputs. Its warps share the rows of x, which come by cp.async two tiles ahead; the weight's tiles go straight to
// registers. Row blocks are the grid's fastest index, so that those that run together read the same weights.
#pragma once

constexpr int kBlockTiles = 8;  // of eight rows
constexpr int kBlockRows = kBlockTiles * kRowsOfTile;
static_assert(kBlockTiles == kLinearWarps, "each warp sums x up for one tile of rows");
constexpr int kStages = 3;
constexpr int kSharedRow = kTileInputs + 8;  // elements: rows begin in other banks

template <typename Weight>
bool has_whole_chunks(const LinearRows& a) {
    return is_aligned<typename Weight::Element>(a.x, a.row_stride) && a.inputs % 8 == 0;
}

// The order of tiles: turn after turn. tile: -1 behind the last one.
struct TileWalk {
    int64_t tiles, tile;
    __device__ __forceinline__ bool ends_turn() const { return tile + kTurns >= tiles; }
    __device__ __forceinline__ void advance() {
        if (tile < 0) return;
        const int64_t turn = tile % kTurns;
        if (!ends_turn())
            tile += kTurns;
        else
            tile = turn + 1 < kTurns && turn + 1 < tiles ? turn + 1 : -1;
    }
};

// Asks for 64 inputs of the block's rows; zeros beyond the last row and input.
template <typename T>
__device__ __forceinline__ void fetch_rows(const LinearRows& a, int64_t first_row, int64_t tile, T* stage) {
    UNROLL for (int i = int(threadIdx.x); i < kBlockRows * 8; i += kLinearThreads) {
        const int row = i / 8, column = i % 8 * 8;
        const int64_t input = tile * kTileInputs + column;
        const bool is_wanted = tile >= 0 && first_row + row < a.rows && input < a.inputs;
        const T* from = static_cast<const T*>(a.x) + (is_wanted ? (first_row + row) * a.row_stride + input : 0);
        copy_16_bytes(stage + row * kSharedRow + column, from, is_wanted);
    }
    commit_copies();
}

template <typename Weight>
struct ManyShared {
    typename Weight::Element x[kStages][kBlockRows][kSharedRow];
    float of_x[kBlockTiles][Weight::kGroups + 1][4][kWarpSize];
    float totals[Weight::kPanels][kBlockTiles][4][kLinearThreads];  // of the turns before: each thread's own
};

template <typename Weight>
__global__ void __launch_bounds__(kLinearThreads, 1) linear_many_kernel(LinearRows a, Weight weight) {
    begin_kernel();
    using T = typename Weight::Element;
    constexpr int kPanels = Weight::kPanels;
    auto& shared = *reinterpret_cast<ManyShared<Weight>*>(dynamic_shared());
    const int lane = int(threadIdx.x % kWarpSize), warp = int(threadIdx.x / kWarpSize), g = lane / 4, t = lane % 4;
    const int64_t first_row = int64_t(blockIdx.x) * kBlockRows, tiles = tiles_of(a.inputs);
    const int64_t panel = (int64_t(blockIdx.y) * kLinearWarps + warp) * kPanels;
    const int64_t last_panel = (a.outputs - 1) / kTileOutputs;
    const auto load_weights = [&](typename Weight::Tile(&to)[kPanels], int64_t tile) {
        UNROLL for (int p = 0; p < kPanels; p++)
            to[p] = weight.load(panel + p < last_panel ? panel + p : last_panel, tile);
    };
    // Rows n · 8 to n · 8 + 7 as the right side's fragments.
    const auto load_x = [&](uint32_t(&to)[kSteps][2], int stage, int n) {
        load_row<Weight::kRun>(to, shared.x[stage][n * kRowsOfTile + g], t);
    };

    float sums[kPanels][kBlockTiles][4] = {};
    TileWalk here{tiles, 0}, ahead{tiles, 0};
    for (int stage = 0; stage + 1 < kStages; stage++, ahead.advance())
        fetch_rows(a, first_row, ahead.tile, &shared.x[stage][0][0]);
    typename Weight::Tile next[kPanels];
    load_weights(next, 0);
    int stage = 0;
    KEEP_LOOP while (here.tile >= 0) {
        wait_for_copies<kStages - 2>();
        __syncthreads();
        fetch_rows(a, first_row, ahead.tile, &shared.x[(stage + kStages - 1) % kStages][0][0]);
        ahead.advance();
        if constexpr (Weight::kGroups > 0) {
            uint32_t x[kSteps][2];
            float of_x[Weight::kGroups + 1][4];
            load_x(x, stage, warp);
            sum_groups<Weight>(x, of_x);
            UNROLL for (int group = 0; group < Weight::kGroups; group++)
                UNROLL for (int i = 0; i < 4; i++) shared.of_x[warp][group][i][lane] = of_x[group][i];
            __syncthreads();
        }
        typename Weight::Tile mine[kPanels];
        uint32_t left[kPanels][kSteps][4];
        UNROLL for (int p = 0; p < kPanels; p++) {
            mine[p] = next[p];
            weight.widen(mine[p], left[p]);
        }
        const bool ends_turn = here.ends_turn(), is_first_turn = here.tile % kTurns == 0;
        here.advance();
        if (here.tile >= 0) load_weights(next, here.tile);
        UNROLL for (int n = 0; n < kBlockTiles; n++) {
            uint32_t x[kSteps][2];
            float of_x[Weight::kGroups + 1][4];
            load_x(x, stage, n);
            UNROLL for (int group = 0; group < Weight::kGroups; group++)
                UNROLL for (int i = 0; i < 4; i++) of_x[group][i] = shared.of_x[n][group][i][lane];
            UNROLL for (int p = 0; p < kPanels; p++) weight.add(mine[p], left[p], x, of_x, sums[p][n]);
        }
        if (ends_turn) {
            UNROLL for (int p = 0; p < kPanels; p++)
                UNROLL for (int n = 0; n < kBlockTiles; n++)
                    UNROLL for (int i = 0; i < 4; i++) {
                        float& total = shared.totals[p][n][i][threadIdx.x];
                        total = is_first_turn ? sums[p][n][i] : total + sums[p][n][i];
                        sums[p][n][i] = 0.0f;
                    }
        }
        stage = (stage + 1) % kStages;
    }
    // Turns without a tile: they too are added, as they are for few rows.
    const float nothing = tiles < kTurns ? 0.0f : -0.0f;
    UNROLL for (int p = 0; p < kPanels; p++)
        UNROLL for (int n = 0; n < kBlockTiles; n++)
            UNROLL for (int i = 0; i < 4; i++)
                store_sum<T>(a, first_row + n * kRowsOfTile + 2 * t + i % 2,
                             (panel + p) * kTileOutputs + g + i / 2 * 8, shared.totals[p][n][i][threadIdx.x] + nothing);
}

template <typename Weight>
int start_many(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    constexpr int64_t kOutputs = kLinearWarps * Weight::kPanels * kTileOutputs;
    const dim3 grid(unsigned((a.rows + kBlockRows - 1) / kBlockRows), unsigned((a.outputs + kOutputs - 1) / kOutputs));
    return launch(name, linear_many_kernel<Weight>, grid, kLinearThreads, sizeof(ManyShared<Weight>), stream, a, weight);
}
