// A row of logits that a cluster's blocks share out (sm_90): each keeps its ids' in shared memory, so the row is read once.
// Chips without clusters have one block a row, which reads it again and again. A warp has a stretch of its block's ids, of
// which a lane takes four at a time, so that sums over warps and lanes go in the order of ids.
#pragma once

#include "launch.h"
#include "tile.h"

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kRowBlocks = 8;  // of a cluster

struct alignas(16) FourLogits {
    float of[4];
};

// Order floats and, among equals, the lower id first: the better candidate is the larger number. 0 is none.
using Ranked = unsigned long long;

__device__ __forceinline__ Ranked ranked(float value, int id) {
    const uint32_t bits = bits_of(value + 0.0f);  // no -0
    return Ranked(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~uint32_t(id);
}

__device__ __forceinline__ float value_of(Ranked one) {
    const auto bits = uint32_t(one >> 32);
    return float_of(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}

__device__ __forceinline__ int id_of(Ranked one) { return int(~uint32_t(one)); }

struct Larger {
    __device__ __forceinline__ Ranked operator()(Ranked a, Ranked b) const { return a > b ? a : b; }
};

struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

// What threads tell each other, in dynamic shared memory. Two of each by turns: who writes one again has passed a meeting
// that all came to after they had read it.
struct Exchange {
    unsigned long long of_warps[2][kRowWarps];
    unsigned long long of_block[2];
};

// Where in the block of that rank lies what in this one is ``mine``.
template <int Blocks, typename T>
__device__ __forceinline__ const T* theirs(int rank, const T* mine) {
    if constexpr (Blocks > 1) return of_block(rank, mine);
    else return mine;
}

template <typename T, typename Join>
__device__ __forceinline__ T join_threads(Exchange& exchange, int turn, T mine, const Join& of_two) {
    static_assert(sizeof(T) == sizeof(unsigned long long));
    UNROLL for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
        mine = of_two(mine, __shfl_xor_sync(kAllLanes, mine, mask));
    T* of_warps = reinterpret_cast<T*>(exchange.of_warps[turn]);
    if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = mine;
    __syncthreads();
    T whole = of_warps[0];
    UNROLL for (int i = 1; i < kRowWarps; i++) whole = of_two(whole, of_warps[i]);
    return whole;
}

// Of the row, and of the blocks before this one.
template <typename T>
struct Joined {
    T row, before;
};

// A function of its own: a kernel that comes here often would else have more code than it runs through.
template <int Blocks, typename T, typename Join>
__device__ __noinline__ Joined<T> join_blocks(Exchange& exchange, int turn, T mine, T none, const Join& of_two) {
    const T whole = join_threads(exchange, turn, mine, of_two);
    if constexpr (Blocks == 1) return {whole, none};
    T* told = reinterpret_cast<T*>(&exchange.of_block[turn]);
    if (threadIdx.x == 0) *told = whole;
    meet_cluster();
    Joined<T> joined = {none, none};
    UNROLL for (int i = 0; i < Blocks; i++) {
        if (i == int(blockIdx.z)) joined.before = joined.row;
        joined.row = of_two(joined.row, *theirs<Blocks>(i, told));
    }
    return joined;
}

template <int Blocks>
struct RowTeam {
    static constexpr int kAtOnce = Blocks > 1 ? 1 : 4;  // that a lane reads: of shared memory or of far away

    Exchange& exchange;
    FourLogits* held;     // this block's ids
    const float* logits;  // the row
    int vocabulary;
    bool is_aligned;
    int turn = 0;

    __device__ __forceinline__ int rank() const { return Blocks > 1 ? int(blockIdx.z) : 0; }
    __device__ __forceinline__ int warp() const { return int(threadIdx.x) / kWarpSize; }
    __device__ __forceinline__ int lane() const { return int(threadIdx.x) % kWarpSize; }

    // Ids that a block has.
    __host__ __device__ static int share_of(int vocabulary) { return (vocabulary + 4 * Blocks - 1) / (4 * Blocks) * 4; }

    __device__ __forceinline__ void meet() const {
        if constexpr (Blocks > 1) meet_cluster();
        else __syncthreads();
    }

    struct Stretch {
        int begin, end;
    };

    // The warp's ids.
    __device__ __forceinline__ Stretch stretch() const {
        const int share = share_of(vocabulary), each = (share + 4 * kRowWarps - 1) / (4 * kRowWarps) * 4;
        const int first = rank() * share, begin = first + warp() * each;
        const int end = begin + each < first + share ? begin + each : first + share;
        return {begin, end < vocabulary ? end : vocabulary};
    }

    __device__ __forceinline__ FourLogits load(int id) const {
        if (is_aligned && id + 4 <= vocabulary) return load_whole<FourLogits>(logits + id);
        FourLogits four;
        UNROLL for (int e = 0; e < 4; e++) four.of[e] = id + e < vocabulary ? logits[id + e] : -INFINITY;
        return four;
    }

    __device__ __forceinline__ FourLogits& held_at(int id) const { return held[(id - rank() * share_of(vocabulary)) / 4]; }

    __device__ __forceinline__ FourLogits four_at(int id) const {
        if constexpr (Blocks > 1) return held_at(id);
        else return load(id);
    }

    // The warp's ids, four a lane: loads some, then takes them. A thread's are the same each time.
    template <int AtOnce = kAtOnce, typename Load, typename Take>
    __device__ __forceinline__ void walk(const Load& load_four, const Take& take) const {
        const Stretch mine = stretch();
        constexpr int kStep = 4 * kWarpSize;
        KEEP_LOOP for (int id = mine.begin + 4 * lane(); id < mine.end; id += AtOnce * kStep) {
            FourLogits fours[AtOnce];
            UNROLL for (int n = 0; n < AtOnce; n++)
                if (id + n * kStep < mine.end) fours[n] = load_four(id + n * kStep);
            UNROLL for (int n = 0; n < AtOnce; n++)
                if (id + n * kStep < mine.end) take(id + n * kStep, fours[n]);
        }
    }

    // As walk, by all of a warp's lanes together, zeros where a lane has no ids: take ends it with true.
    template <typename Load, typename Take>
    __device__ __forceinline__ void walk_together(const Load& load_four, const Take& take) const {
        const Stretch mine = stretch();
        KEEP_LOOP for (int first = mine.begin; first < mine.end; first += 4 * kWarpSize) {
            const int id = first + 4 * lane();
            FourLogits four = {};
            if (id < mine.end) four = load_four(id);
            if (take(id, four)) break;
        }
    }

    // Of what a block's threads have.
    template <typename T, typename Join>
    __device__ __forceinline__ T join_block(T mine, const Join& of_two) {
        return join_threads(exchange, turn ^= 1, mine, of_two);
    }

    // Of what all threads of the row have, in one order.
    template <typename T, typename Join>
    __device__ __forceinline__ Joined<T> join(T mine, T none, const Join& of_two) {
        return join_blocks<Blocks>(exchange, turn ^= 1, mine, none, of_two);
    }

    // What this block's warps had at the last join, until the second from then.
    __device__ __forceinline__ const unsigned long long* of_warps() const { return exchange.of_warps[turn]; }
};

// blockIdx.x is the row. cluster_bytes, block_bytes: the shared memory of a cluster's blocks but for the logits that they
// keep behind it, and of a block alone.
template <auto ClusterKernel, auto BlockKernel, typename Args>
int launch_rows(const char* name, int64_t rows, size_t cluster_bytes, size_t block_bytes, const Args& a) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(a.logits) % sizeof(FourLogits) == 0 && a.row_stride % 4 == 0;
    cluster_bytes += size_t(RowTeam<kRowBlocks>::share_of(int(a.vocabulary))) * sizeof(float);
    if (has_clusters<ClusterKernel>() && cluster_bytes <= chip().shared_bytes)
        return launch_clusters(name, ClusterKernel, dim3(unsigned(rows), 1, kRowBlocks), kRowBlocks, kRowThreads,
                               cluster_bytes, a.stream, a, is_aligned);
    return launch(name, BlockKernel, dim3(unsigned(rows)), kRowThreads, block_bytes, a.stream, a, is_aligned);
}
