// What one warp does in attention: 16 query rows against tiles of 32 positions, with the running maximum of Milakov and
// Gimelshein (2018, arXiv 1805.02867) as FlashAttention-2 keeps it in fragments (Dao 2023, arXiv 2307.08691).
//
// Each tile is summed up by itself; 256 positions, a section, are its tiles put together in their order, and a row is its
// sections in theirs. Tiles and sections begin at multiples of their size. Neither the other rows, nor how a prompt was cut
// into chunks, nor whether a tile had a warp and a section a block of its own changes anything in a row's sum.
#pragma once

#include "launch.h"
#include "tile.h"

constexpr int kTileRows = 16;
constexpr int kTileKeys = 32;
constexpr int kSection = 256;  // positions: whole tiles
constexpr int kPadBytes = 16;  // behind each row in shared memory, so that ldmatrix meets every bank

// What is multiplied: half precision holds fp8 exactly, and a pair takes one instruction.
template <typename Cache>
using ElementOf = std::conditional_t<std::is_same_v<Cache, fp8>, fp16, Cache>;

// Sums of one row, or of an element of it.
struct Softmax {
    float peak, total;
};

// How a tile is added to those before it, and a section: element = fmaf(its, take, whole's · keep).
struct Weights {
    float keep, take;
};

__device__ __forceinline__ Weights put_together(Softmax& whole, const Softmax& section) {
    if (section.peak == -INFINITY) return {1.0f, 0.0f};
    const float peak = fmaxf(whole.peak, section.peak);
    const Weights w = {exp_two(whole.peak - peak), exp_two(section.peak - peak)};
    whole = {peak, fmaf(section.total, w.take, whole.total * w.keep)};
    return w;
}

// How scores become exponents of two, and which are seen.
struct Scores {
    float scale;      // of a product, to the base of two; with a cap, to what the hyperbolic tangent takes
    float cap;        // times log2 e, or 0
    int window;       // or 0
    __device__ __forceinline__ float of(float product) const {
        return cap == 0.0f ? product * scale : tanh_of(product * scale) * cap;
    }
    __device__ __forceinline__ void of_all(float (&products)[kTileKeys / 8][4]) const {
        if (cap == 0.0f) {
            UNROLL for (auto& four : products)
                UNROLL for (float& product : four) product *= scale;
        } else {
            UNROLL for (auto& four : products)
                UNROLL for (float& product : four) product = tanh_roughly(product * scale) * cap;
        }
    }
    __device__ __forceinline__ bool is_seen(int key, int position) const {
        return key <= position && (window == 0 || key > position - window);
    }
};

// Rows of shared memory, of 16-bit elements.
template <typename T, int Dim>
struct SharedRows {
    static constexpr int kStride = Dim + kPadBytes / int(sizeof(T));
    T* first;
    __device__ __forceinline__ const T* at(int row, int column) const { return first + row * kStride + column; }
};

// A warp's queries as the left side of products: in registers, or where heads are too wide for that read each time.
template <typename T, int Dim, bool AreKept = Dim <= 128>
struct WarpQueries {
    static constexpr bool kAreKept = AreKept;
    SharedRows<T, Dim> rows;
    uint32_t kept[kAreKept ? Dim / 16 : 1][4];

    __device__ __forceinline__ void keep() {
        if constexpr (kAreKept)
            UNROLL for (int d = 0; d < Dim; d += 16) read(kept[d / 16], d);
    }
    __device__ __forceinline__ void take(uint32_t (&a)[4], int d) const {
        if constexpr (kAreKept)
            UNROLL for (int i = 0; i < 4; i++) a[i] = kept[d / 16][i];
        else
            read(a, d);
    }
    __device__ __forceinline__ void read(uint32_t (&a)[4], int d) const {
        const int lane = int(threadIdx.x) % kWarpSize;
        load_matrices(a, rows.at(lane % 16, d + lane / 16 * 8));
    }
};

// Lane 4 · g + t has rows g and g + 8, of each 8 columns 2t and 2t + 1.
template <typename T, int Dim>
struct WarpRows {
    static constexpr int kPart = 8;  // eights of columns that products are made of together
    float sums[Dim / 8][4];
    Softmax softmax[2];

    __device__ __forceinline__ void start_section() {
        UNROLL for (int n = 0; n < Dim / 8; n++)
            UNROLL for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
        softmax[0] = softmax[1] = {-INFINITY, 0.0f};
    }

    // first: the tile's first position; positions: of the two rows, -1 where there is none; columns: of values
    __device__ __forceinline__ void add_tile(const WarpQueries<T, Dim>& q, SharedRows<T, Dim> keys,
                                             SharedRows<T, Dim> values, int columns, int first,
                                             const int (&positions)[2], const Scores& scores) {
        float weights[kTileKeys / 8][4] = {};
        Softmax tile[2];
        multiply_keys(q, keys, weights);
        weigh_tile(weights, tile, first, positions, scores);
        const Weights w[2] = {put_together(softmax[0], tile[0]), put_together(softmax[1], tile[1])};
        // Mostly the peaks are what they were.
        if (__ballot_sync(kAllLanes, w[0].keep != 1.0f || w[1].keep != 1.0f)) rescale({w[0].keep, w[1].keep});
        multiply_values(weights, values, columns, [&](int n, const float (&products)[4]) {
            UNROLL for (int i = 0; i < 4; i++) sums[n][i] = fmaf(products[i], w[i / 2].take, sums[n][i]);
        });
    }

    // The products of a tile become weights relative to the rows' peaks in it. Peaks are rounded up to whole numbers: what
    // sums are multiplied with later are powers of two, which is exact. is_seen: all of it, by all rows; rows: 1 where the
    // second one is nothing.
    __device__ __forceinline__ static void weigh_tile(float (&s)[kTileKeys / 8][4], Softmax (&tile)[2], int first,
                                                      const int (&positions)[2], const Scores& scores,
                                                      bool is_seen = false, int rows = 2) {
        const int t = int(threadIdx.x) % 4;
        scores.of_all(s);
        UNROLL for (int row = 0; row < 2; row++) {
            float peak = -INFINITY, total = 0.0f;
            tile[row] = {peak, total};
            if (row >= rows) continue;
            if (!is_seen) {
                UNROLL for (int n = 0; n < kTileKeys / 8; n++)
                    UNROLL for (int i = 0; i < 2; i++)
                        if (!scores.is_seen(first + n * 8 + 2 * t + i, positions[row])) s[n][2 * row + i] = -INFINITY;
            }
            // NaN stays in the weights, and so in their total.
            UNROLL for (int n = 0; n < kTileKeys / 8; n++)
                UNROLL for (int i = 0; i < 2; i++) peak = fmaxf(peak, s[n][2 * row + i]);
            UNROLL for (int mask = 1; mask < 4; mask *= 2) peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, mask));
            peak = ceilf(peak);
            const float from = peak == -INFINITY ? 0.0f : peak;
            UNROLL for (int n = 0; n < kTileKeys / 8; n++)
                UNROLL for (int i = 0; i < 2; i++) total += s[n][2 * row + i] = exp_two(s[n][2 * row + i] - from);
            UNROLL for (int mask = 1; mask < 4; mask *= 2) total += __shfl_xor_sync(kAllLanes, total, mask);
            tile[row] = {peak, total};
        }
    }

    template <typename Queries>
    __device__ __forceinline__ static void multiply_keys(const Queries& q, SharedRows<T, Dim> keys,
                                                         float (&products)[kTileKeys / 8][4]) {
        const int lane = int(threadIdx.x) % kWarpSize;
        UNROLL for (int d = 0; d < Dim; d += 16) {
            uint32_t a[4];
            q.take(a, d);
            UNROLL for (int n = 0; n < kTileKeys / 8; n += 2) {
                uint32_t b[4];
                load_matrices(b, keys.at(n * 8 + lane % 8 + lane / 16 * 8, d + lane / 8 % 2 * 8));
                multiply_tile<T>(products[n], a, {b[0], b[1]});
                multiply_tile<T>(products[n + 1], a, {b[2], b[3]});
            }
        }
    }

    __device__ __forceinline__ void rescale(const float (&keep)[2]) {
        UNROLL for (int n = 0; n < Dim / 8; n++)
            UNROLL for (int i = 0; i < 4; i++) sums[n][i] *= keep[i / 2];
    }

    // Weights of 16 positions as the left side of a product.
    __device__ __forceinline__ static void pair_up(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
        a[0] = pair_of<T>(low[0], low[1]), a[1] = pair_of<T>(low[2], low[3]);
        a[2] = pair_of<T>(high[0], high[1]), a[3] = pair_of<T>(high[2], high[3]);
    }

    // columns: that there are. ``take(n, products)``: of the n-th eight columns.
    template <typename Take>
    __device__ __forceinline__ static void multiply_values(const float (&weights)[kTileKeys / 8][4],
                                                           SharedRows<T, Dim> values, int columns, const Take& take) {
        const int lane = int(threadIdx.x) % kWarpSize;
        uint32_t a[kTileKeys / 16][4];
        UNROLL for (int i = 0; i < kTileKeys / 16; i++) pair_up(weights[2 * i], weights[2 * i + 1], a[i]);
        UNROLL for (int begin = 0; begin < Dim / 8; begin += kPart) {
            if (Dim > 128 && 8 * begin >= columns) continue;
            UNROLL for (int n = begin; n < begin + kPart; n += 2) {
                float low[4] = {}, high[4] = {};
                UNROLL for (int i = 0; i < kTileKeys / 16; i++) {
                    uint32_t b[4];
                    load_matrices_transposed(b, values.at(16 * i + lane % 16, n * 8 + lane / 16 * 8));
                    multiply_tile<T>(low, a[i], {b[0], b[1]});
                    multiply_tile<T>(high, a[i], {b[2], b[3]});
                }
                take(n, low);
                take(n + 1, high);
            }
        }
    }
};

// What the sections so far come to; the sums lie in shared memory, each lane's own: [Dim / 8][4][lanes].
template <typename T, int Dim>
struct WholeRows {
    float* sums;
    Softmax softmax[2];

    __device__ __forceinline__ float& at(int n, int i) const {
        return sums[(n * 4 + i) * kWarpSize + int(threadIdx.x) % kWarpSize];
    }

    __device__ __forceinline__ void start() {
        UNROLL for (int n = 0; n < Dim / 8; n++)
            UNROLL for (int i = 0; i < 4; i++) at(n, i) = 0.0f;
        softmax[0] = softmax[1] = {-INFINITY, 0.0f};
    }

    __device__ __forceinline__ void add(const WarpRows<T, Dim>& section) {
        const Weights w[2] = {put_together(softmax[0], section.softmax[0]), put_together(softmax[1], section.softmax[1])};
        UNROLL for (int n = 0; n < Dim / 8; n++)
            UNROLL for (int i = 0; i < 4; i++)
                at(n, i) = fmaf(section.sums[n][i], w[i / 2].take, at(n, i) * w[i / 2].keep);
    }
};
