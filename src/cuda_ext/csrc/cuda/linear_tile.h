// out = x · weightᵀ + bias. The weight is the product's left side and rows of x are columns of the right one, so no row
// meets another. Three kernels, for few rows (where reading the weight is what takes time), for many, and for many with
// wgmma, that add up alike:
// turn w of eight takes the weight's tiles of 64 inputs w, w + 8, w + 16, …, and turns are added up in order. How a row's
// sum is ordered thus depends on the number of inputs alone, not on which warp of which block took a turn.
//
// A Weight says how a tile of 16 outputs is loaded and multiplied:
//   Tile                          what a lane holds of one
//   kRun                          inputs that a lane takes side by side (quantised.h)
//   kAhead                        tiles in flight, for few rows
//   kPanels                       of 16 outputs that a warp does at once, for many rows
//   kScales                       groups of inputs that are scaled each by itself, or 0
//   kGroups                       those whose sums of x ``add`` needs: all or 0
//   load(panel, tile)             → Tile
//   widen(tile, a)                a[kSteps]: the left side's fragments
//   add(tile, a, x, of_x, sums)   sums += the product with eight rows' fragments x[kSteps]; of_x[kGroups]: their sums
//   add_group(tile, group, product, of_x, sums)   sums += a group's product, scaled
#pragma once

#include "launch.h"
#include "quantised.h"
#include "tile.h"

struct LinearRows {
    void* out;
    const void* x;
    const float* scales;
    const float* bias;
    int64_t rows, inputs, outputs, row_stride, out_stride, out_dtype, is_deterministic;
};

constexpr int kTurns = 8;
constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = kLinearWarps * kWarpSize;
constexpr int kRowsOfTile = 8;

// What is read once need not push out what is read again.
template <typename Words>
__device__ __forceinline__ Words load_once(const Words* from) {
#if defined(__CUDACC__)
    Words to;
    if constexpr (sizeof(Words) == 16)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                     : "l"(from));
    else
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
    return to;
#else
    return load_whole<Words>(from);
#endif
}

// Elements [0, Count) from ``from``, as pairs; zeros from ``left`` on.
template <int Count, typename T>
__device__ __forceinline__ void load_pairs(uint32_t* to, const T* from, int64_t left, bool is_aligned) {
    if (is_aligned && left >= Count) {
        if constexpr (Count == 8) {
            const auto words = load_whole<uint4>(from);
            to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
        } else {
            const auto words = load_whole<uint2>(from);
            to[0] = words.x, to[1] = words.y;
        }
        return;
    }
    const auto element = [&](int i) { return i < left ? to_float(from[i]) : 0.0f; };
    UNROLL for (int i = 0; i < Count; i += 2) to[i / 2] = pair_of<T>(element(i), element(i + 1));
}

// What ``operation`` makes of the elements of two pairs.
template <typename T, typename Operation>
__device__ __forceinline__ uint32_t of_pairs(uint32_t a, uint32_t b, const Operation& operation) {
#if defined(__CUDACC__)
    std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2> x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    const auto made = operation(x, y);
    memcpy(&a, &made, sizeof a);
    return a;
#else
    const auto half = [](uint32_t pair, int which) { return to_float(T{uint16_t(pair >> 16 * which)}); };
    return pair_of<T>(operation(half(a, 0), half(b, 0)), operation(half(a, 1), half(b, 1)));
#endif
}

// A row's part of the right side of a tile's products.
template <int Run, typename T>
__device__ __forceinline__ void load_row(uint32_t (&to)[kSteps][2], const T* row, int64_t tile, int t, int64_t inputs,
                                         bool is_aligned) {
    constexpr int kStepsOfRun = Run / 4;
    UNROLL for (int step = 0; step < kSteps; step += kStepsOfRun) {
        const int64_t first = tile * kTileInputs + input_of(Run, step, t, 0);
        load_pairs<Run>(&to[step][0], row + first, inputs - first, is_aligned);
    }
}

template <typename T>
constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80 : 0x3c003c00;  // two of them

// The sums of each group of x: products with ones. One row more than groups: there may be none.
template <typename Weight>
__device__ __forceinline__ void sum_groups(const uint32_t (&x)[kSteps][2], float (&of_x)[Weight::kGroups + 1][4]) {
    if constexpr (Weight::kGroups > 0) {
        using T = typename Weight::Element;
        constexpr uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
        constexpr int kStepsOfGroup = kSteps / Weight::kGroups;
        UNROLL for (int group = 0; group < Weight::kGroups; group++) {
            UNROLL for (int i = 0; i < 4; i++) of_x[group][i] = 0.0f;
            UNROLL for (int step = 0; step < kStepsOfGroup; step++)
                multiply_tile<T>(of_x[group], ones, x[group * kStepsOfGroup + step]);
        }
    }
}

template <typename T>
__device__ __forceinline__ void store_sum(const LinearRows& a, int64_t row, int64_t output, float sum) {
    if (output >= a.outputs || row >= a.rows) return;
    if (a.scales) sum *= a.scales[output];
    if (a.bias) sum += a.bias[output];
    const int64_t place = row * a.out_stride + output;
    if (a.out_dtype == kFloat32)
        static_cast<float*>(a.out)[place] = sum;
    else
        static_cast<T*>(a.out)[place] = from_float<T>(sum);
}

// A cluster along z, of one block or more, does 16 outputs and up to 8 · Tiles rows; each of its warps is a turn.
template <typename Weight, int Tiles>
__global__ void __launch_bounds__(kLinearThreads, 1) linear_kernel(LinearRows a, Weight weight, bool is_aligned) {
    begin_kernel();
    using T = typename Weight::Element;
    constexpr int kOfTurn = Tiles * 4 * kWarpSize;  // sums
    auto* parts = reinterpret_cast<float*>(dynamic_shared());
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize, g = lane / 4, t = lane % 4;
    const int warps = int(blockDim.x) / kWarpSize, rank = int(blockIdx.z), turn = rank * warps + warp;
    const int64_t panel = blockIdx.x, first_row = int64_t(blockIdx.y) * Tiles * kRowsOfTile;
    const int64_t tiles = tiles_of(a.inputs);

    float sums[Tiles][4] = {};
    typename Weight::Tile ahead[Weight::kAhead];
    UNROLL for (int i = 0; i < Weight::kAhead; i++)
        if (turn + i * kTurns < tiles) ahead[i] = weight.load(panel, turn + i * kTurns);
    KEEP_LOOP for (int64_t first = turn; first < tiles; first += Weight::kAhead * kTurns)
        UNROLL for (int i = 0; i < Weight::kAhead; i++) {
            const int64_t tile = first + i * kTurns, next = tile + Weight::kAhead * kTurns;
            if (tile >= tiles) continue;
            uint32_t x[Tiles][kSteps][2] = {};
            UNROLL for (int n = 0; n < Tiles; n++) {
                const int64_t row = first_row + n * kRowsOfTile + g;
                const T* from = static_cast<const T*>(a.x) + row * a.row_stride;
                if (row < a.rows) load_row<Weight::kRun>(x[n], from, tile, t, a.inputs, is_aligned);
            }
            const typename Weight::Tile mine = ahead[i];
            if (next < tiles) ahead[i] = weight.load(panel, next);
            uint32_t left[kSteps][4];
            weight.widen(mine, left);
            UNROLL for (int n = 0; n < Tiles; n++) {
                float of_x[Weight::kGroups + 1][4];
                sum_groups<Weight>(x[n], of_x);
                weight.add(mine, left, x[n], of_x, sums[n]);
            }
        }

    UNROLL for (int n = 0; n < Tiles; n++)
        UNROLL for (int i = 0; i < 4; i++) parts[warp * kOfTurn + (n * 4 + i) * kWarpSize + lane] = sums[n][i];
    const bool is_alone = warps == kTurns;
    if (is_alone)
        __syncthreads();
    else
        meet_cluster();
    for (int index = rank * int(blockDim.x) + int(threadIdx.x); index < kOfTurn; index += kLinearThreads) {
        const int n = index / (4 * kWarpSize), i = index / kWarpSize % 4, from = index % kWarpSize;
        const int64_t output = panel * kTileOutputs + from / 4 + i / 2 * 8;
        const int64_t row = first_row + n * kRowsOfTile + from % 4 * 2 + i % 2;
        float sum = 0.0f;
        UNROLL for (int w = 0; w < kTurns; w++) {
            const float* theirs = is_alone ? parts : of_block(w / warps, parts);
            const float part = theirs[w % warps * kOfTurn + index];
            sum = w == 0 ? part : sum + part;
        }
        store_sum<T>(a, row, output, sum);
    }
    if (!is_alone) meet_cluster();  // before a block's memory goes
}

#include "linear_many.h"
// TileWalk is there.
#include "linear_group.h"

constexpr unsigned kMostInCluster = 4;

template <int Tiles, typename Weight>
int start_linear(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    const bool is_aligned = ::is_aligned<typename Weight::Element>(a.x, a.row_stride);
    constexpr int64_t kRows = Tiles * kRowsOfTile;
    dim3 grid(unsigned((a.outputs + kTileOutputs - 1) / kTileOutputs), unsigned((a.rows + kRows - 1) / kRows));
    // A small matrix has fewer panels than the chip has processors: its turns are dealt out to several blocks each.
    if (grid.x * grid.y < unsigned(chip().processors) && has_clusters<linear_kernel<Weight, Tiles>>())
        while (grid.z < kMostInCluster && grid.x * grid.y * grid.z < unsigned(chip().processors)) grid.z *= 2;
    const int warps = kTurns / int(grid.z);
    const size_t bytes = size_t(warps) * Tiles * 4 * kWarpSize * sizeof(float);
    return launch_clusters(name, linear_kernel<Weight, Tiles>, grid, grid.z, warps * kWarpSize, bytes, stream, a, weight,
                           is_aligned);
}

template <typename Weight>
int start_linear(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    if (a.rows > kFewRows && has_whole_chunks<Weight>(a)) {
        const bool takes_wgmma = has_wgmma() && !a.is_deterministic;
        return takes_wgmma ? start_group(name, a, weight, stream) : start_many(name, a, weight, stream);
    }
    if (a.rows <= kRowsOfTile) return start_linear<1>(name, a, weight, stream);
    if (a.rows <= 2 * kRowsOfTile) return start_linear<2>(name, a, weight, stream);
    return start_linear<4>(name, a, weight, stream);
}
