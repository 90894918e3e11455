// The product for few rows, where reading the weight is what takes time, included by linear_tile.h. As many blocks as the
// chip has processors walk the panels, each through as many, so that the weight's tiles keep coming, several ahead, each
// warp's own into its own ring in shared memory. A warp is a turn; where there is room, two sets of turns do a panel each.
// Rows of x are in shared memory too, in chunks of a tile for each turn: all of them, or as many as there is room for,
// which then come by in a ring. A panel's turns are added up while the next panel is multiplied.
#pragma once

constexpr int kLeastSlots = 3;  // of chunks: two come while one is read
constexpr unsigned kMostInCluster = 4;

// Up to 8 rows, two sets of turns; up to 16, one, whose tiles come the earlier.
template <int Tiles>
constexpr int kMostSets = Tiles == 1 ? 2 : 1;
template <typename Weight, int Tiles>
constexpr int kInFlight = Tiles == 1 ? Weight::kAhead : 2 * Weight::kAhead - 1;

// Elements of a chunk's row: a tile for each turn, and some so that rows begin in other banks.
template <typename Weight>
__host__ __device__ constexpr int width_of(int turns) {
    return turns * kTileInputs + (Weight::kRun == 16 ? 8 : Weight::kRun == 8 ? 32 : 16);
}

// Where what a block has in shared memory begins, in bytes, and how much it is.
template <typename Weight, int Tiles>
struct FewPlaces {
    size_t rings, sums_of_x, x, end;

    __host__ __device__ FewPlaces(int sets, int turns, int rows, int slots) {
        rings = 16 + size_t(2) * sets * turns * Tiles * 4 * kWarpSize * sizeof(float);
        sums_of_x = rings + size_t(sets) * turns * kInFlight<Weight, Tiles> * Weight::kSlotBytes;
        x = sums_of_x + size_t(slots) * sets * turns * Weight::kGroups * Tiles * kRowsOfTile * sizeof(float);
        end = x + size_t(slots) * rows * width_of<Weight>(turns) * sizeof(typename Weight::Element);
    }
};

// Asks for ``count`` inputs from ``first`` on of each row; zeros beyond the last one.
template <typename T>
__device__ __forceinline__ void fetch_chunk(const LinearRows& a, int first_row, int rows, int first, int count, int width,
                                            T* slot, bool is_aligned) {
    KEEP_LOOP for (int i = int(threadIdx.x); i < rows * (count / 8); i += int(blockDim.x)) {
        const int row = i / (count / 8), column = i % (count / 8) * 8, left = int(a.inputs) - first - column;
        const T* from = static_cast<const T*>(a.x) + (first_row + row) * a.row_stride + first + column;
        T* to = slot + row * width + column;
        if (left <= 0 || (is_aligned && left >= 8)) {
            copy_16_bytes(to, left > 0 ? from : a.x, left > 0);
        } else {
            UNROLL for (int k = 0; k < 8; k++) to[k] = k < left ? from[k] : from_float<T>(0.0f);
        }
    }
}

// A cluster along z, of one block or more, does its share of the panels with up to 8 · Tiles rows, ``most_rows`` of them.
// slots: of chunks. has_barriers: those in shared memory.
template <typename Weight, int Tiles>
__global__ void __launch_bounds__(kMostSets<Tiles> * kTurns * kWarpSize, 1)
    linear_kernel(LinearRows a, Weight weight, int most_rows, int slots, bool is_aligned, bool has_barriers) {
    using T = typename Weight::Element;
    using Tile = typename Weight::Tile;
    constexpr int kOfTurn = Tiles * 4 * kWarpSize;  // sums
    constexpr int kDepth = kInFlight<Weight, Tiles>, kGroups = Weight::kGroups;
    const int lane = int(threadIdx.x) % kWarpSize, warp = uniform(int(threadIdx.x) / kWarpSize), g = lane / 4, t = lane % 4;
    const int blocks = int(gridDim.z), rank = int(blockIdx.z), turns = kTurns / blocks, threads = int(blockDim.x);
    const int turn_bits = __ffs(turns) - 1, sets = threads / kWarpSize >> turn_bits;  // turns: a power of two
    const int set = warp >> turn_bits, of_block_turn = warp & (turns - 1), turn = rank * turns + of_block_turn;
    const int64_t panels = (a.outputs + kTileOutputs - 1) / kTileOutputs;
    const int begin = int(blockIdx.x * panels / gridDim.x), end = int((blockIdx.x + 1) * panels / gridDim.x);
    const int tiles = int(tiles_of(a.inputs)), chunks = (tiles + kTurns - 1) / kTurns, width = width_of<Weight>(turns);
    const int first_row = int(blockIdx.y) * most_rows, rows_left = int(a.rows) - first_row;
    const int rows = rows_left < most_rows ? rows_left : most_rows;
    const FewPlaces<Weight, Tiles> places(sets, turns, most_rows, slots);
    unsigned char* const memory = dynamic_shared();
    auto& barrier = *reinterpret_cast<Mbarrier*>(memory);
    auto* parts = reinterpret_cast<float*>(memory + 16);
    unsigned char* const ring = memory + places.rings + size_t(warp) * kDepth * Weight::kSlotBytes;
    auto* sums_of_x = reinterpret_cast<float*>(memory + places.sums_of_x);
    auto* x = reinterpret_cast<T*>(memory + places.x);
    const bool is_alone = blocks == 1, is_split = is_alone && has_barriers;
    if (is_split && threadIdx.x == 0) start_barrier(barrier, threads / kWarpSize);

    int fetched_panel = begin + set, fetched_chunk = 0;
    const auto fetch = [&](unsigned char* slot) {
        const int tile = fetched_chunk * kTurns + turn;
        if (fetched_panel < end && tile < tiles) weight.fetch(fetched_panel, tile, slot);
        if (++fetched_chunk < chunks) return;
        fetched_chunk = 0;
        fetched_panel += sets;
    };
    // Chunks are brought once where there is a slot for each, else for every panel.
    const int groups = (end - begin + sets - 1) / sets, steps = groups * chunks;
    int to_fetch = slots == chunks ? chunks : steps, to_await = to_fetch, x_chunk = 0, x_slot = 0;
    const auto fetch_x = [&] {
        if (to_fetch == 0) return;
        to_fetch--;
        fetch_chunk(a, first_row, rows, (x_chunk * kTurns + rank * turns) * kTileInputs, turns * kTileInputs, width,
                    x + x_slot * most_rows * width, is_aligned);
        x_chunk = x_chunk + 1 < chunks ? x_chunk + 1 : 0;
        x_slot = x_slot + 1 < slots ? x_slot + 1 : 0;
    };
    KEEP_LOOP for (int i = 0; i + 1 < kLeastSlots; i++) fetch_x();
    UNROLL for (int i = 0; i < kDepth; i++) {
        fetch(ring + i * Weight::kSlotBytes);
        commit_copies();
    }

    // Until every warp has put its sums of group ``group`` into parts, and has added up those of the group before.
    const auto meet = [&](int group) {
        if (is_split)
            wait_for_phase(barrier, group);
        else if (is_alone)
            __syncthreads();
        else
            meet_cluster();
    };
    const auto add_up = [&](int group) {
        const float* mine = parts + group % 2 * sets * turns * kOfTurn;
        // By turns, since there are more threads than sums.
        const int shifted = (int(threadIdx.x) + group * 8 * kWarpSize) & (threads - 1);
        for (int index = rank * threads + shifted; index < sets * kOfTurn; index += threads * blocks) {
            const int of_set = index / kOfTurn, of_turn = index % kOfTurn;
            const int n = of_turn / (4 * kWarpSize), from = of_turn / 4 % kWarpSize, k = of_turn % 4;
            const int panel = begin + group * sets + of_set;
            if (panel >= end) continue;
            float sum = 0.0f;
            UNROLL for (int w = 0; w < kTurns; w++) {
                const float* theirs = is_alone ? mine : of_block(w >> turn_bits, mine);
                const float part = theirs[(of_set * turns + (w & (turns - 1))) * kOfTurn + of_turn];
                sum = w == 0 ? part : sum + part;
            }
            store_sum<T>(a, first_row + n * kRowsOfTile + from % 4 * 2 + k % 2,
                         int64_t(panel) * kTileOutputs + from / 4 + k / 2 * 8, sum);
        }
    };

    float sums[Tiles][4] = {};
    int chunk = 0, slot = 0, group = 0, depth = 0;
    KEEP_LOOP for (int step = 0; step < steps; step++) {
        const bool is_new = to_await > 0;
        if (is_new) {
            to_await--;
            wait_for_copies<(kDepth > 1 ? 1 : 0)>();
            __syncthreads();
            fetch_x();
        } else {
            wait_for_copies<kDepth - 1>();
            __syncwarp();
        }
        unsigned char* const place = ring + depth * Weight::kSlotBytes;
        depth = depth + 1 < kDepth ? depth + 1 : 0;
        const bool is_mine = chunk * kTurns + turn < tiles && begin + group * sets + set < end;
        Tile mine;
        if (is_mine) mine = weight.take(place);
        __syncwarp();
        fetch(place);
        commit_copies();
        if (is_mine) {
            uint32_t left[kSteps][4];
            weight.widen(mine, left);
            const T* chunk_x = x + slot * most_rows * width + of_block_turn * kTileInputs;
            float* of_chunk = sums_of_x + (slot * sets * turns + warp) * kGroups * Tiles * kRowsOfTile;
            UNROLL for (int n = 0; n < Tiles; n++) {
                // What rows that are not there give is not looked at.
                const int row = n * kRowsOfTile + g < rows ? n * kRowsOfTile + g : rows - 1;
                uint32_t right[kSteps][2];
                float of_x[kGroups + 1][4];
                load_row<Weight::kRun>(right, chunk_x + row * width, t);
                if constexpr (kGroups > 0) {
                    float* of_rows = of_chunk + n * kRowsOfTile + 2 * t;
                    if (is_new) {
                        sum_groups<Weight>(right, of_x);
                        UNROLL for (int i = 0; i < kGroups; i++)
                            if (g == 0)
                                store_whole(of_rows + i * Tiles * kRowsOfTile,
                                            uint2{bits_of(of_x[i][0]), bits_of(of_x[i][1])});
                    } else {
                        UNROLL for (int i = 0; i < kGroups; i++) {
                            const auto two = load_whole<uint2>(of_rows + i * Tiles * kRowsOfTile);
                            of_x[i][0] = of_x[i][2] = float_of(two.x), of_x[i][1] = of_x[i][3] = float_of(two.y);
                        }
                    }
                }
                weight.add(mine, left, right, of_x, sums[n]);
            }
        }
        slot = slot + 1 < slots ? slot + 1 : 0;
        if (++chunk < chunks) continue;
        chunk = 0;
        if (group > 0) meet(group - 1);
        UNROLL for (int n = 0; n < Tiles; n++) {
            float4 four;
            four.x = sums[n][0], four.y = sums[n][1], four.z = sums[n][2], four.w = sums[n][3];
            store_whole(parts + (group % 2 * sets * turns + warp) * kOfTurn + (n * kWarpSize + lane) * 4, four);
            UNROLL for (int k = 0; k < 4; k++) sums[n][k] = 0.0f;
        }
        if (group > 0) add_up(group - 1);
        if (is_split) {
            __syncwarp();
            if (lane == 0) arrive(barrier);
        }
        group++;
    }
    meet(group - 1);
    add_up(group - 1);
    if (!is_alone) meet_cluster();  // before a block's memory goes
}

template <int Tiles, typename Weight>
int start_few(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    using Places = FewPlaces<Weight, Tiles>;
    using T = typename Weight::Element;
    const int64_t panels = (a.outputs + kTileOutputs - 1) / kTileOutputs;
    const int chunks = int((tiles_of(a.inputs) + kTurns - 1) / kTurns);
    const auto processors = unsigned(chip().processors), at_most = unsigned(panels);
    int most_rows = a.rows < Tiles * kRowsOfTile ? int(a.rows) : Tiles * kRowsOfTile;
    const bool is_new = has_clusters<linear_kernel<Weight, Tiles>>();
    dim3 grid(at_most < processors ? at_most : processors, unsigned((a.rows + most_rows - 1) / most_rows));
    // A small matrix has fewer panels than the chip has processors: its turns are dealt out to several blocks each, where
    // there is more than a tile for each.
    if (chunks > 1 && is_new)
        while (grid.z < kMostInCluster && grid.x * grid.y * grid.z * 2 <= processors) grid.z *= 2;
    const int turns = kTurns / int(grid.z);
    // All of x is better than two sets of turns, and these are better than one.
    const auto slots_of = [&](int sets) {
        const size_t none = Places(sets, turns, most_rows, 0).end, one = Places(sets, turns, most_rows, 1).end - none;
        const int room = none < chip().shared_bytes ? int((chip().shared_bytes - none) / one) : 0;
        return chunks < room ? chunks : room;
    };
    const auto suffices = [&](int slots) { return slots == chunks || slots >= kLeastSlots; };
    int sets = kMostSets<Tiles>;
    if (panels <= processors || (slots_of(sets) < chunks && (slots_of(1) == chunks || !suffices(slots_of(sets))))) sets = 1;
    while (most_rows > 1 && !suffices(slots_of(sets))) most_rows = (most_rows + 1) / 2;
    grid.y = unsigned((a.rows + most_rows - 1) / most_rows);
    const int slots = slots_of(sets);
    return launch_clusters(name, linear_kernel<Weight, Tiles>, grid, grid.z, sets * turns * kWarpSize,
                           Places(sets, turns, most_rows, slots).end, stream, a, weight, most_rows, slots,
                           is_aligned<T>(a.x, a.row_stride), is_new);
}

template <typename Weight>
int start_few(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    return a.rows <= kRowsOfTile ? start_few<1>(name, a, weight, stream) : start_few<2>(name, a, weight, stream);
}
