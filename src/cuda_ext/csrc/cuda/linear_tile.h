// out = x · weightᵀ + bias. The weight is the product's left side and rows of x are columns of the right one, so no row
// meets another. Three kernels, for few rows (where reading the weight is what takes time), for many, and for many with
// wgmma, add up alike: turn w of sixteen takes the weight's tiles of 64 inputs w, w + 16, w + 32, …, and turns are added up
// in order. How a row's sum is ordered thus depends on the number of inputs alone, not on which warp of which block took a
// turn. A fourth one, for some rows with wgmma, has an order of its own.
//
// A Weight says how a tile of 16 outputs is loaded and multiplied:
//   Tile                          what a lane holds of one
//   kRun                          inputs that a lane takes side by side (quantised.h)
//   kAhead                        tiles of a warp in flight, for up to 8 rows and for up to 16
//   kPanels                       of 16 outputs that a warp does at once, for many rows
//   kScales                       groups of inputs that are scaled each by itself, or 0
//   kGroups                       those whose sums of x ``add`` needs: all or 0
//   load(panel, tile)             → Tile
//   widen(tile, a)                a[kSteps]: the left side's fragments
//   add(tile, a, x, of_x, sums)   sums += the product with eight rows' fragments x[kSteps]; of_x[kGroups]: their sums
//   add_group(tile, group, product, of_x, sums)   sums += a group's product, scaled
//   fetch(panel, tile, slot)      asks for what load brings, into kSlotBytes of shared memory, by the warp that then takes
//   take(slot)                    → Tile, once the copies of all lanes are there
//   offsets_of(tile, pair, a)     a: two groups' offsets, as linear_some.h multiplies them
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

constexpr int kTurns = 16;
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
    return pair_of<T>(operation(element_of<T>(a, 0), element_of<T>(b, 0)),
                      operation(element_of<T>(a, 1), element_of<T>(b, 1)));
#endif
}

// A row's part of the right side of a tile's products, from shared memory.
template <int Run, typename T>
__device__ __forceinline__ void load_row(uint32_t (&to)[kSteps][2], const T* row, int t) {
    constexpr int kStepsOfRun = Run / 4;
    UNROLL for (int step = 0; step < kSteps; step += kStepsOfRun) {
        const T* from = row + input_of(Run, step, t, 0);
        if constexpr (kStepsOfRun == 1) {
            const auto words = load_whole<uint2>(from);
            to[step][0] = words.x, to[step][1] = words.y;
        } else {
            UNROLL for (int i = 0; i < kStepsOfRun; i += 2) {
                const auto words = load_whole<uint4>(from + 4 * i);
                to[step + i][0] = words.x, to[step + i][1] = words.y;
                to[step + i + 1][0] = words.z, to[step + i + 1][1] = words.w;
            }
        }
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
            of_x[group][2] = of_x[group][0], of_x[group][3] = of_x[group][1];  // as they are: rows of ones are alike
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

#include "linear_few.h"
// TileWalk is there.
#include "linear_many.h"
// column_of is there.
#include "linear_group.h"
#include "linear_some.h"

constexpr int kFewRows = 16, kSomeRows = 64;

template <typename Weight>
int start_linear(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    if (a.rows == 0 || a.outputs == 0) return kOk;
    if (a.rows <= kFewRows || !has_whole_chunks<Weight>(a)) return start_few(name, a, weight, stream);
    if (!has_wgmma() || a.is_deterministic) return start_many(name, a, weight, stream);
    return a.rows <= kSomeRows ? start_some(name, a, weight, stream) : start_group(name, a, weight, stream);
}
