// Launchers of linear and pack_weight: cut the rows into tiles and the panels into work items for the threads.
#include "arena.h"
#include "level.h"
#include "library.h"
#include "parallel.h"

namespace {

constexpr int64_t kProductsAThread = 1 << 16;  // below, waking another thread costs more than it saves
constexpr int64_t kItemsAThread = 4;           // so that a thread that is held up has less to do
constexpr int64_t kTilesAnItem = 8;            // whose inputs stay in the second-level cache
constexpr int64_t kOverrun = 16;               // floats that laying out a tile may write beyond its end

// Tiles of the rows as the kernels read them. One row is a tile as it is; the others are laid out anew.
bool lay_out(const LinearArgs& a, LinearTiles& tiles) {
    static Arena memory;
    if (a.rows == 1) return true;
    const int64_t most_rows = (a.rows + tiles.count - 1) / tiles.count;
    tiles.stride = most_rows * a.inputs + kOverrun;
    auto* laid = reinterpret_cast<float*>(memory.reserve(tiles.count * tiles.stride * int64_t(sizeof(float))));
    if (!laid) return false;
    const int64_t elements = most_rows * a.inputs;
    parallel_ranges(tiles.count, (1 << 16) / elements + 1, [&](int64_t begin, int64_t end) {
        current_level().lay_tiles(a, tiles, laid, begin, end);
    });
    tiles.x = laid;
    return true;
}

}  // namespace

extern "C" {

EXPORT int shoal_linear(const LinearArgs* args) {
    const LinearArgs& a = *args;
    if (a.rows == 0 || a.outputs == 0) return kOk;
    if (a.bits) return current_level().linear_integers ? current_level().linear_integers(a) : kOtherLayout;
    if (a.dtype == kBFloat16 && current_level().linear_bf16) return current_level().linear_bf16(a);
    const int64_t most_rows = current_level().linear_rows;
    LinearTiles tiles{a.x, a.rows, (a.rows + most_rows - 1) / most_rows, 0};
    if (!lay_out(a, tiles)) return kNoMemory;

    const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
    const int64_t blocks = (tiles.count + kTilesAnItem - 1) / kTilesAnItem;
    const int64_t useful = a.rows * a.inputs * a.outputs / kProductsAThread;
    const int64_t wanted = useful < 2 || thread_count() < 2 ? 1 : thread_count() * kItemsAThread / blocks;
    const int64_t most = useful < panels ? useful : panels;
    const int64_t pieces = at_least_one(wanted < most ? wanted : most);
    parallel_items(blocks * pieces, true, [&](int64_t item, int) {
        const int64_t block = item / pieces, piece = item % pieces;
        current_level().linear(a, tiles,
                               {cut(tiles.count, block, blocks), cut(tiles.count, block + 1, blocks),
                                cut(panels, piece, pieces), cut(panels, piece + 1, pieces)});
    });
    return kOk;
}

EXPORT int shoal_pack_weight(const PackWeightArgs* a) {
    const int64_t panels = (a->rows + kPanel - 1) / kPanel;
    parallel_ranges(panels, (1 << 14) / at_least_one(a->words) + 1,
                    [&](int64_t begin, int64_t end) { current_level().pack_weight(*a, begin, end); });
    return kOk;
}

}  // extern "C"
