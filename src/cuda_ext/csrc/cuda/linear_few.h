// The product for few rows, where reading the weight is what takes time, included by linear_tile.h. As many blocks as the
// chip has processors walk the panels, each through as many, so that the weight's tiles keep coming, kAhead steps before
// they are needed, in registers. A warp is a turn; in a step it does its tile of each of two panels, with the same inputs.
// The rows of x are in shared memory, in chunks of a tile for each turn: all of them, or as many as there is room for,
// which then come by in a ring.
#pragma once

constexpr int kAtOnce = 2;  // panels
constexpr int kFewThreads = kTurns * kWarpSize;
constexpr int kLeastSlots = 3;  // of chunks: two come while one is read
constexpr int kApart = 32;      // elements between rows of a chunk: they begin in other banks
constexpr unsigned kMostInCluster = 4;

// Panels by twos, each time all chunks.
struct FewWalk {
    int panel, chunk, chunks;
    __device__ __forceinline__ void advance() {
        if (++chunk < chunks) return;
        chunk = 0;
        panel += kAtOnce;
    }
};

// Inputs of a chunk's row that a block of so many warps needs.
__host__ __device__ constexpr int width_of(int warps) { return warps * kTileInputs; }

__host__ __device__ constexpr size_t part_bytes(int tiles, int warps) {
    return size_t(2) * kAtOnce * warps * tiles * 4 * kWarpSize * sizeof(float);
}

// Asks for ``width`` inputs from ``first`` on; zeros beyond the last one.
template <typename T>
__device__ __forceinline__ void fetch_chunk(const LinearRows& a, int64_t first_row, int rows, int64_t first, int width,
                                            T* slot, bool is_aligned) {
    for (int i = int(threadIdx.x); i < rows * (width / 8); i += int(blockDim.x)) {
        const int row = i / (width / 8), column = i % (width / 8) * 8;
        const int64_t input = first + column, left = a.inputs - input;
        const T* from = static_cast<const T*>(a.x) + (first_row + row) * a.row_stride + input;
        T* to = slot + row * (width + kApart) + column;
        if (left <= 0 || (is_aligned && left >= 8)) {
            copy_16_bytes(to, left > 0 ? from : a.x, left > 0);
        } else {
            UNROLL for (int k = 0; k < 8; k++) to[k] = k < left ? from[k] : from_float<T>(0.0f);
        }
    }
}

// A cluster along z, of one block or more, does its share of the panels with up to 8 · Tiles rows. slots: of chunks.
template <typename Weight, int Tiles>
__global__ void __launch_bounds__(kFewThreads, 1) linear_kernel(LinearRows a, Weight weight, int slots, bool is_aligned) {
    using T = typename Weight::Element;
    constexpr int kOfTurn = Tiles * 4 * kWarpSize;  // sums
    const int lane = int(threadIdx.x) % kWarpSize, warp = uniform(int(threadIdx.x) / kWarpSize), g = lane / 4, t = lane % 4;
    const int warps = int(blockDim.x) / kWarpSize, rank = int(blockIdx.z), turn = rank * warps + warp;
    const int warp_bits = __ffs(warps) - 1;  // a power of two
    const int64_t panels = (a.outputs + kTileOutputs - 1) / kTileOutputs;
    const int begin = int(blockIdx.x * panels / gridDim.x), end = int((blockIdx.x + 1) * panels / gridDim.x);
    const int tiles = int(tiles_of(a.inputs)), chunks = (tiles + kTurns - 1) / kTurns, width = width_of(warps);
    const int64_t first_row = int64_t(blockIdx.y) * Tiles * kRowsOfTile, rows_left = a.rows - first_row;
    const int rows = int(rows_left < Tiles * kRowsOfTile ? rows_left : Tiles * kRowsOfTile);
    auto* parts = reinterpret_cast<float*>(dynamic_shared());
    auto* x = reinterpret_cast<T*>(dynamic_shared() + part_bytes(Tiles, warps));
    const int of_slot = rows * (width + kApart);

    const auto load = [&](typename Weight::Tile& to, const FewWalk& at, int p) {
        const int tile = at.chunk * kTurns + turn;
        if (at.panel + p < end && tile < tiles) to = weight.load(at.panel + p, tile);
    };
    typename Weight::Tile ahead[Weight::kAhead][kAtOnce];
    FewWalk here{begin, 0, chunks}, next = here;
    UNROLL for (int i = 0; i < Weight::kAhead; i++, next.advance())
        UNROLL for (int p = 0; p < kAtOnce; p++) load(ahead[i][p], next, p);

    // Chunks are brought once where there is a slot for each, else for every step.
    const int groups = (end - begin + kAtOnce - 1) / kAtOnce;
    int to_fetch = slots == chunks ? chunks : groups * chunks, to_await = to_fetch;
    int fetched_chunk = 0, fetched_slot = 0, slot = 0, buffer = 0;
    const auto fetch = [&] {
        if (to_fetch > 0) {
            to_fetch--;
            const int64_t first = (int64_t(fetched_chunk) * kTurns + rank * warps) * kTileInputs;
            fetch_chunk(a, first_row, rows, first, width, x + fetched_slot * of_slot, is_aligned);
            fetched_chunk = fetched_chunk + 1 < chunks ? fetched_chunk + 1 : 0;
            fetched_slot = fetched_slot + 1 < slots ? fetched_slot + 1 : 0;
        }
        commit_copies();
    };
    UNROLL for (int i = 0; i < kLeastSlots - 1; i++) fetch();

    float sums[kAtOnce][Tiles][4] = {};
    KEEP_LOOP while (here.panel < end)
        UNROLL for (int i = 0; i < Weight::kAhead; i++) {
            if (here.panel >= end) break;
            if (to_await > 0) {
                to_await--;
                wait_for_copies<kLeastSlots - 2>();
                __syncthreads();
                fetch();
            }
            if (here.chunk * kTurns + turn < tiles) {
                uint32_t right[Tiles][kSteps][2];
                float of_x[Tiles][Weight::kGroups + 1][4];
                UNROLL for (int n = 0; n < Tiles; n++) {
                    // What rows that are not there give is not looked at.
                    const int row = n * kRowsOfTile + g < rows ? n * kRowsOfTile + g : rows - 1;
                    const T* from = x + slot * of_slot + row * (width + kApart) + warp * kTileInputs;
                    load_row<Weight::kRun>(right[n], from, t);
                    sum_groups<Weight>(right[n], of_x[n]);
                }
                UNROLL for (int p = 0; p < kAtOnce; p++) {
                    if (here.panel + p >= end) continue;
                    uint32_t left[kSteps][4];
                    weight.widen(ahead[i][p], left);
                    UNROLL for (int n = 0; n < Tiles; n++)
                        weight.add(ahead[i][p], left, right[n], of_x[n], sums[p][n]);
                    load(ahead[i][p], next, p);
                }
            } else {
                UNROLL for (int p = 0; p < kAtOnce; p++) load(ahead[i][p], next, p);
            }
            next.advance();
            slot = slot + 1 < slots ? slot + 1 : 0;
            if (here.chunk + 1 == chunks) {
                // One barrier is enough: what is read behind it is written over behind the next one.
                float* mine = parts + buffer * kAtOnce * warps * kOfTurn;
                buffer ^= 1;
                UNROLL for (int p = 0; p < kAtOnce; p++)
                    UNROLL for (int n = 0; n < Tiles; n++) {
                        float4 four;
                        four.x = sums[p][n][0], four.y = sums[p][n][1], four.z = sums[p][n][2], four.w = sums[p][n][3];
                        store_whole(mine + (p * warps + warp) * kOfTurn + (n * kWarpSize + lane) * 4, four);
                        UNROLL for (int k = 0; k < 4; k++) sums[p][n][k] = 0.0f;
                    }
                const bool is_alone = warps == kTurns;
                if (is_alone)
                    __syncthreads();
                else
                    meet_cluster();
                for (int index = rank * int(blockDim.x) + int(threadIdx.x); index < kAtOnce * kOfTurn;
                     index += kFewThreads) {
                    const int p = index / kOfTurn, of_turn = index % kOfTurn;
                    const int n = of_turn / (4 * kWarpSize), from = of_turn / 4 % kWarpSize, k = of_turn % 4;
                    const int64_t output = int64_t(here.panel + p) * kTileOutputs + from / 4 + k / 2 * 8;
                    const int64_t row = first_row + n * kRowsOfTile + from % 4 * 2 + k % 2;
                    float sum = 0.0f;
                    UNROLL for (int w = 0; w < kTurns; w++) {
                        const float* theirs = is_alone ? mine : of_block(w >> warp_bits, mine);
                        const float part = theirs[(p * warps + (w & (warps - 1))) * kOfTurn + of_turn];
                        sum = w == 0 ? part : sum + part;
                    }
                    if (here.panel + p < end) store_sum<T>(a, row, output, sum);
                }
            }
            here.advance();
        }
    if (warps < kTurns) meet_cluster();  // before a block's memory goes
}

template <int Tiles, typename Weight>
int start_few(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    using T = typename Weight::Element;
    constexpr int64_t kRows = Tiles * kRowsOfTile;
    const int64_t panels = (a.outputs + kTileOutputs - 1) / kTileOutputs, rows = a.rows < kRows ? a.rows : kRows;
    const int chunks = int((tiles_of(a.inputs) + kTurns - 1) / kTurns);
    const auto processors = unsigned(chip().processors), at_most = unsigned(panels);
    dim3 grid(at_most < processors ? at_most : processors, unsigned((a.rows + kRows - 1) / kRows));
    // A small matrix has fewer panels than the chip has processors: its turns are dealt out to several blocks each, where
    // there is enough to read.
    if (chunks > 1 && has_clusters<linear_kernel<Weight, Tiles>>())
        while (grid.z < kMostInCluster && grid.x * grid.y * grid.z * 2 <= processors) grid.z *= 2;
    const int warps = kTurns / int(grid.z);
    const size_t of_slot = size_t(rows) * (width_of(warps) + kApart) * sizeof(T), of_parts = part_bytes(Tiles, warps);
    const int room = int((chip().shared_bytes - of_parts) / of_slot);
    const int slots = chunks < room ? chunks : room;
    return launch_clusters(name, linear_kernel<Weight, Tiles>, grid, grid.z, warps * kWarpSize, of_parts + slots * of_slot,
                           stream, a, weight, slots, is_aligned<T>(a.x, a.row_stride));
}

// Whether a chunk's slots have room beside the sums of 8 · Tiles rows.
template <int Tiles>
bool has_room() {
    const size_t of_slot = size_t(Tiles) * kRowsOfTile * (width_of(kTurns) + kApart) * sizeof(uint16_t);
    return part_bytes(Tiles, kTurns) + kLeastSlots * of_slot <= chip().shared_bytes;
}

template <typename Weight>
int start_few(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    return a.rows > kRowsOfTile && has_room<2>() ? start_few<2>(name, a, weight, stream)
                                                 : start_few<1>(name, a, weight, stream);
}
