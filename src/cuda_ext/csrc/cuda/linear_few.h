// The product for few rows, where reading the weight is what takes time, included by linear_tile.h. As many blocks as the
// chip has processors walk the panels, each through as many, so that the weight's tiles keep coming, several ahead, each
// warp's own into its own ring in shared memory. A warp is a turn; where there is room, two sets of turns do a panel each.
// Rows of x are in shared memory too, in chunks of a tile for each turn: all of them, or as many as there is room for,
// which then come by in a ring. A panel's turns are added up while the next panel is multiplied.
#pragma once

constexpr int kLeastSlots = 3;  // of chunks: two come while one is read
constexpr unsigned kMostInCluster = 4;

// Up to 8 rows, two sets of turns where registers suffice; up to 16, one.
template <typename Weight, int Tiles>
constexpr int kMostSets = Tiles == 1 && Weight::kGroups <= 2 ? 2 : 1;
template <typename Weight, int Tiles>
constexpr int kInFlight = Weight::kAhead[Tiles - 1];

// Elements of a chunk's row: a tile for each turn, and some so that rows begin in other banks.
template <typename Weight>
__host__ __device__ constexpr int width_of(int turns) {
    return turns * kTileInputs + (Weight::kRun == 16 ? 8 : Weight::kRun == 8 ? 32 : 16);
}

// What the blocks of a launch are, worked out once; of shared memory, where in bytes what begins.
struct FewShape {
    int tiles, chunks, turns, turn_bits, sets;  // turns: of a block, a power of two
    int most_rows, width, slots;                // of x: rows, elements of a chunk's row, chunks
    int rings, sums_of_x, x, end;
    int of_slot, sums_of_slot;  // elements, floats of a slot
    bool has_barriers;          // in shared memory
};

template <typename Weight, int Tiles>
FewShape few_shape(int64_t inputs, int sets, int turns, int rows, int slots) {
    FewShape shape = {};
    shape.tiles = int(tiles_of(inputs)), shape.chunks = (shape.tiles + kTurns - 1) / kTurns;
    shape.turns = turns, shape.sets = sets, shape.most_rows = rows, shape.slots = slots;
    while (1 << shape.turn_bits < turns) shape.turn_bits++;
    shape.width = width_of<Weight>(turns), shape.of_slot = rows * shape.width;
    shape.sums_of_slot = sets * turns * Weight::kGroups * Tiles * kRowsOfTile;
    shape.rings = 16 + 2 * sets * turns * Tiles * 4 * kWarpSize * int(sizeof(float));
    shape.sums_of_x = shape.rings + sets * turns * kInFlight<Weight, Tiles> * Weight::kSlotBytes;
    shape.x = shape.sums_of_x + slots * shape.sums_of_slot * int(sizeof(float));
    shape.end = shape.x + slots * shape.of_slot * int(sizeof(typename Weight::Element));
    return shape;
}

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

// A cluster along z, of one block or more, does its share of the panels with up to 8 · Tiles rows.
template <typename Weight, int Tiles>
__global__ void __launch_bounds__(kMostSets<Weight, Tiles> * kTurns * kWarpSize, 1)
    linear_kernel(LinearRows a, Weight weight, FewShape shape, bool is_aligned) {
    begin_kernel();
    using T = typename Weight::Element;
    using Tile = typename Weight::Tile;
    constexpr int kOfTurn = Tiles * 4 * kWarpSize;  // sums
    constexpr int kDepth = kInFlight<Weight, Tiles>, kGroups = Weight::kGroups;
    const int lane = int(threadIdx.x % kWarpSize), warp = uniform(int(threadIdx.x / kWarpSize)), g = lane / 4, t = lane % 4;
    const int blocks = int(gridDim.z), rank = int(blockIdx.z), threads = int(blockDim.x);
    const int sets = shape.sets, turns = shape.turns, set = warp >> shape.turn_bits, of_block_turn = warp & (turns - 1);
    const int turn = uniform(rank * turns + of_block_turn), my_chunks = (shape.tiles - turn + kTurns - 1) / kTurns;
    const int64_t panels = (a.outputs + kTileOutputs - 1) / kTileOutputs;
    const int begin = int(blockIdx.x * panels / gridDim.x), end = int((blockIdx.x + 1) * panels / gridDim.x);
    const int first_row = int(blockIdx.y) * shape.most_rows, rows_left = int(a.rows) - first_row;
    const int rows = rows_left < shape.most_rows ? rows_left : shape.most_rows;
    unsigned char* const memory = dynamic_shared();
    auto& barrier = *reinterpret_cast<Mbarrier*>(memory);
    auto* parts = reinterpret_cast<float*>(memory + 16);
    unsigned char* const ring = memory + shape.rings + warp * (kDepth * Weight::kSlotBytes);
    auto* sums_of_x = reinterpret_cast<float*>(memory + shape.sums_of_x) + warp * (kGroups * Tiles * kRowsOfTile) + 2 * t;
    auto* x = reinterpret_cast<T*>(memory + shape.x);
    const bool is_alone = blocks == 1, is_split = is_alone && shape.has_barriers;
    if (is_split && threadIdx.x == 0) start_barrier(barrier, threads);

    int fetched_panel = begin + set, fetched_chunk = 0;
    const auto fetch = [&](unsigned char* slot) {
        if (fetched_panel < end && fetched_chunk < my_chunks)
            weight.fetch(fetched_panel, fetched_chunk * kTurns + turn, slot);
        if (++fetched_chunk < shape.chunks) return;
        fetched_chunk = 0;
        fetched_panel += sets;
    };
    // Chunks are brought once where there is a slot for each, else for every panel.
    const int groups = (end - begin + sets - 1) / sets, steps = groups * shape.chunks;
    int to_fetch = shape.slots == shape.chunks ? shape.chunks : steps, to_await = to_fetch, x_chunk = 0, x_slot = 0;
    const auto fetch_x = [&] {
        if (to_fetch == 0) return;
        to_fetch--;
        fetch_chunk(a, first_row, rows, (x_chunk * kTurns + rank * turns) * kTileInputs, turns * kTileInputs, shape.width,
                    x + x_slot * shape.of_slot, is_aligned);
        x_chunk = x_chunk + 1 < shape.chunks ? x_chunk + 1 : 0;
        x_slot = x_slot + 1 < shape.slots ? x_slot + 1 : 0;
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
                const float* theirs = is_alone ? mine : of_block(w >> shape.turn_bits, mine);
                const float part = theirs[(of_set * turns + (w & (turns - 1))) * kOfTurn + of_turn];
                sum = w == 0 ? part : sum + part;
            }
            store_sum<T>(a, first_row + n * kRowsOfTile + from % 4 * 2 + k % 2,
                         int64_t(panel) * kTileOutputs + from / 4 + k / 2 * 8, sum);
        }
    };

    // What rows that are not there give is not looked at.
    const T* row_x[Tiles];
    UNROLL for (int n = 0; n < Tiles; n++) {
        const int row = n * kRowsOfTile + g < rows ? n * kRowsOfTile + g : rows - 1;
        row_x[n] = x + row * shape.width + of_block_turn * kTileInputs;
    }
    float sums[Tiles][4] = {};
    unsigned char* place = ring;
    int chunk = 0, slot = 0, group = 0;
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
        const bool is_mine = chunk < my_chunks && begin + group * sets + set < end;
        Tile mine;
        if (is_mine) mine = weight.take(place);
        __syncwarp();
        fetch(place);
        commit_copies();
        place = place < ring + (kDepth - 1) * Weight::kSlotBytes ? place + Weight::kSlotBytes : ring;
        if (is_mine) {
            uint32_t left[kSteps][4];
            weight.widen(mine, left);
            float* of_chunk = sums_of_x + slot * shape.sums_of_slot;
            UNROLL for (int n = 0; n < Tiles; n++) {
                uint32_t right[kSteps][2];
                float of_x[kGroups + 1][4];
                load_row<Weight::kRun>(right, row_x[n] + slot * shape.of_slot, t);
                if constexpr (kGroups > 0) {
                    float* of_rows = of_chunk + n * kRowsOfTile;
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
        slot = slot + 1 < shape.slots ? slot + 1 : 0;
        if (++chunk < shape.chunks) continue;
        chunk = 0;
        if (group > 0) meet(group - 1);
        UNROLL for (int n = 0; n < Tiles; n++) {
            float4 four;
            four.x = sums[n][0], four.y = sums[n][1], four.z = sums[n][2], four.w = sums[n][3];
            store_whole(parts + (group % 2 * sets * turns + warp) * kOfTurn + (n * kWarpSize + lane) * 4, four);
            UNROLL for (int k = 0; k < 4; k++) sums[n][k] = 0.0f;
        }
        if (group > 0) add_up(group - 1);
        if (is_split) arrive(barrier);
        group++;
    }
    meet(group - 1);
    add_up(group - 1);
    if (!is_alone) meet_cluster();  // before a block's memory goes
}

template <int Tiles, typename Weight>
int start_few(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    using T = typename Weight::Element;
    const int64_t panels = (a.outputs + kTileOutputs - 1) / kTileOutputs;
    const int chunks = int((tiles_of(a.inputs) + kTurns - 1) / kTurns);
    const auto processors = unsigned(chip().processors), at_most = unsigned(panels);
    int rows = a.rows < Tiles * kRowsOfTile ? int(a.rows) : Tiles * kRowsOfTile;
    const bool is_new = has_clusters<linear_kernel<Weight, Tiles>>();
    dim3 grid(at_most < processors ? at_most : processors, unsigned((a.rows + rows - 1) / rows));
    // A small matrix has fewer panels than the chip has processors: its turns are dealt out to several blocks each, where
    // there is more than a tile for each.
    if (chunks > 1 && is_new)
        while (grid.z < kMostInCluster && grid.x * grid.y * grid.z * 2 <= processors) grid.z *= 2;
    const int turns = kTurns / int(grid.z);
    const auto end_of = [&](int sets, int slots) {
        return few_shape<Weight, Tiles>(a.inputs, sets, turns, rows, slots).end;
    };
    const auto slots_of = [&](int sets) {
        const int none = end_of(sets, 0), room = (int(chip().shared_bytes) - none) / (end_of(sets, 1) - none);
        return chunks < room ? chunks : room;
    };
    const auto suffices = [&](int sets) { return slots_of(sets) == chunks || slots_of(sets) >= kLeastSlots; };
    // All of x is better than two sets of turns, and these are better than one.
    int sets = kMostSets<Weight, Tiles>;
    if (panels <= processors || !suffices(sets) || (slots_of(sets) < chunks && slots_of(1) == chunks)) sets = 1;
    while (rows > 1 && !suffices(sets)) rows = (rows + 1) / 2;
    grid.y = unsigned((a.rows + rows - 1) / rows);
    FewShape shape = few_shape<Weight, Tiles>(a.inputs, sets, turns, rows, slots_of(sets));
    shape.has_barriers = is_new;
    return launch_clusters(name, linear_kernel<Weight, Tiles>, grid, grid.z, sets * turns * kWarpSize, size_t(shape.end),
                           stream, a, weight, shape, is_aligned<T>(a.x, a.row_stride));
}

template <typename Weight>
int start_few(const char* name, const LinearRows& a, const Weight& weight, void* stream) {
    return a.rows <= kRowsOfTile ? start_few<1>(name, a, weight, stream) : start_few<2>(name, a, weight, stream);
}
