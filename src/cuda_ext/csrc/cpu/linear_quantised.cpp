// Launchers of linear_quantised and pack_quantised: cut rows and panels into work items for the threads.
#include <cstring>

#include "arena.h"
#include "level.h"
#include "library.h"
#include "parallel.h"

namespace {

constexpr int64_t kMostRowsAnItem = 64;        // whose codes stay in the second-level cache
constexpr int64_t kProductsAnItem = 1 << 16;   // below, handing it out costs more than it saves
constexpr int64_t kItemsAThread = 1;           // handing out more costs more than a thread that is held up
constexpr int64_t kItemsOfBlocks = 4;          // of a thread, where rows are cut too: blocks seldom go round evenly

// Of each block of rows: the columns with outliers, and where each tile's begin.
struct Columns {
    OutlierColumn* of_tiles;
    const OutlierColumn** begins;
    int64_t bytes;
};

// One group of one output into its panel's block.
void place(const PackQuantisedArgs& a, const WeightFormat& format, int64_t output, int64_t group) {
    const int64_t lane = output % kPanel, at = output * a.groups + group;
    auto* block = static_cast<uint8_t*>(a.panels) +
                  (output / kPanel * a.groups + group) * format.block_bytes();
    const uint8_t* codes = a.codes + at * a.group;
    for (int64_t i = 0; i < a.group; i++) {
        const auto [byte, upper] = format.place(lane, i, current_level().linear_integers != nullptr);
        const int shift = upper ? 4 : 0, mask = a.bits == 8 ? 0xff : 0xf << shift;
        block[byte] = uint8_t((block[byte] & ~mask) | codes[i] << shift);
    }
    uint8_t* scales = block + format.lines() * kLine + lane * 2;
    std::memcpy(scales, a.scales + at, 2);
    if (format.has_offset) std::memcpy(scales + 32, a.offsets + at, 2);
}

}  // namespace

extern "C" {

EXPORT int shoal_linear_quantised(const QuantisedLinearArgs* args) {
    const QuantisedLinearArgs& a = *args;
    if (a.rows == 0 || a.outputs == 0) return kOk;
    if (current_level().linear_narrow) return current_level().linear_narrow(a);
    const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
    const int64_t blocks = (a.rows + kMostRowsAnItem - 1) / kMostRowsAnItem;
    const int64_t useful = a.rows * a.inputs * a.outputs / kProductsAnItem / blocks;
    const int64_t pieces = pieces_of(blocks, blocks > 1 ? kItemsOfBlocks : kItemsAThread, useful, panels);
    static Arena memory;
    const int64_t most_rows = (a.rows + blocks - 1) / blocks, room = most_rows * QuantisedRow::count(a.inputs);
    const auto carve = [&](Carver&& from) {
        return Columns{from.take<OutlierColumn>(blocks * room), from.take<const OutlierColumn*>(blocks * (most_rows + 1)),
                       from.taken()};
    };
    char* reserved = memory.reserve(carve(Carver(nullptr)).bytes);
    if (!reserved) return kNoMemory;
    const Columns columns = carve(Carver(reserved));
    parallel_items(blocks, true, [&](int64_t block, int) {
        current_level().find_outliers(a, cut(a.rows, block, blocks), cut(a.rows, block + 1, blocks),
                                      columns.of_tiles + block * room, columns.begins + block * (most_rows + 1));
    });
    parallel_items(blocks * pieces, true, [&](int64_t item, int thread) {
        const int64_t piece = item / blocks, block = item % blocks;
        current_level().linear_quantised(a, {cut(a.rows, block, blocks), cut(a.rows, block + 1, blocks),
                                             cut(panels, piece, pieces), cut(panels, piece + 1, pieces),
                                             columns.begins + block * (most_rows + 1), ReadAhead::of(a.rows, thread)});
    });
    return kOk;
}

// Codes of W8 are those of the weights + 128. The last panel's missing outputs stay what they were: zero.
EXPORT int shoal_pack_quantised(const PackQuantisedArgs* args) {
    const PackQuantisedArgs& a = *args;
    const WeightFormat format{a.bits, a.group, a.offsets != nullptr};
    // By panels: in some layouts two outputs of a panel share a byte.
    const int64_t panels = (a.rows + kPanel - 1) / kPanel;
    parallel_ranges(panels, (1 << 12) / at_least_one(a.groups * a.group) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t output = begin * kPanel; output < end * kPanel && output < a.rows; output++)
            for (int64_t group = 0; group < a.groups; group++) place(a, format, output, group);
    });
    return kOk;
}

}  // extern "C"
