// Compiled for AVX-512, VNNI and AMX where the compiler knows them; else there is nothing in it.
#include "linear_amx.h"

#if defined(__AMX_BF16__)
#include "arena.h"
#include "linear_plan.h"
#include "parallel.h"
#include "tile_product.h"

namespace {

constexpr int64_t kSection = 8;                     // strips: their weights stay in the first-level cache
constexpr int64_t kMostRows = 256;                  // of an item
constexpr int64_t kMostPartBytes = 1 << 20;         // of an item's rows: they stay in the second-level cache
constexpr int64_t kFetchAhead = 2048;               // bytes
constexpr int64_t kItemsAThread = 4;                // so that a thread that is held up has less to do
constexpr int64_t kProductsAnItem = 1 << 17;        // below, handing it out costs more than it saves

struct Scratch {
    // Four rows more than an item has: loads and stores 4 KiB apart are taken for dependent.
    alignas(64) float sums[kPanelsAtOnce][kMostRows + 4][kPanel];
    alignas(64) Narrow last_strip[kPanelsAtOnce][kStripWords];
};

Scratch& scratch() {
    static thread_local Scratch memory;
    return memory;
}

struct Parts {
    Narrow* words;
    int64_t strips;
    // Of ``row`` and the 15 after it.
    const Narrow* at(int64_t row, int64_t strip) const { return parts_of(words, row, strips) + strip * 2 * kPartWords; }
};

struct Item {
    int64_t first_row, last_row, first_panel, last_panel;
};

// The last strip of some panels, where it is not a whole one: zeros behind its inputs.
void pad_last_strip(const Narrow* weights, int64_t stride, int64_t words, Narrow (*to)[kStripWords], int64_t panels) {
    for (int64_t panel = 0; panel < panels; panel++) {
        __builtin_memcpy(to[panel], weights + panel * stride, size_t(words) * sizeof(Narrow));
        __builtin_memset(to[panel] + words, 0, size_t(kStripWords - words) * sizeof(Narrow));
    }
}

template <int Panels>
void multiply_panels(const LinearArgs& a, const Parts& x, const Item& item, int64_t panel) {
    Scratch& s = scratch();
    const int64_t pairs = (a.inputs + 1) / 2, stride = pairs * 2 * kPanel, whole = pairs * 2 / kStrip;
    const Narrow* weights = static_cast<const Narrow*>(a.panels) + panel * stride;
    const int64_t rows = item.last_row - item.first_row, sections = rows > kTileRows ? (whole + kSection - 1) / kSection : 1;
    const auto add = [&](int64_t strip, int64_t strips, const Narrow* from, int64_t from_stride, int64_t ahead) {
        for (int64_t row = 0; row < rows; row += kTileRows)
            multiply_tiles<Panels>({x.at(item.first_row + row, strip), from, from_stride, strips},
                                   {s.sums[0][row], int64_t(sizeof s.sums[0] / sizeof(float)), kTileLine}, strip == 0,
                                   row == 0 ? ahead : kNoFetch);
    };
    for (int64_t section = 0; section < sections && whole; section++) {
        const int64_t first = whole * section / sections, last = whole * (section + 1) / sections;
        add(first, last - first, weights + first * kStripWords, stride, kFetchAhead);
    }
    if (whole < x.strips) {
        pad_last_strip(weights + whole * kStripWords, stride, stride - whole * kStripWords, s.last_strip, Panels);
        add(whole, 1, s.last_strip[0], kStripWords, kNoFetch);
    }
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < Panels; i++) {
            const int64_t output = (panel + i) * kPanel, n = min_of(kPanel, a.outputs - output);
            Vec sum = load(s.sums[i][row]);
            if (a.bias) sum = sum + load_n(a.bias + output, n);
            store_n(a.out + (item.first_row + row) * a.out_stride + output, sum, n);
        }
}

void multiply(const LinearArgs& a, const Parts& x, const Item& item) {
    load_shapes(item.last_row - item.first_row);
    for (int64_t panel = item.first_panel; panel < item.last_panel; panel += kPanelsAtOnce)
        with_panels(item.last_panel - panel, [&](auto panels) { multiply_panels<panels()>(a, x, item, panel); });
    _tile_release();
}

}  // namespace

int linear_amx(const LinearArgs& a) {
    static Arena memory;
    const int64_t strips = strips_of(a.inputs), blocks_of_16 = (a.rows + kTileRows - 1) / kTileRows;
    const int64_t tile_bytes = strips * 2 * kPartWords * int64_t(sizeof(Narrow));
    auto* words = reinterpret_cast<Narrow*>(memory.reserve(blocks_of_16 * tile_bytes));
    if (!words) return kNoMemory;
    const Parts parts{words, strips};
    parallel_ranges(a.rows, (1 << 15) / at_least_one(a.inputs) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            split_row(a.x + row * a.row_stride, a.inputs, parts_of(words, row, strips));
    });
    const int64_t most = at_least_one(min_of(kMostRows / kTileRows, kMostPartBytes / at_least_one(tile_bytes)));
    const int64_t blocks = (blocks_of_16 + most - 1) / most, panels = (a.outputs + kPanel - 1) / kPanel;
    const int64_t useful = a.rows * a.inputs * a.outputs / kProductsAnItem / blocks;
    const int64_t groups = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
    const int64_t pieces = pieces_of(blocks, kItemsAThread, useful, groups);
    parallel_items(blocks * pieces, true, [&](int64_t index, int) {
        const int64_t block = index / pieces, piece = index % pieces;
        const auto row_at = [&](int64_t i) { return min_of(a.rows, cut(blocks_of_16, i, blocks) * kTileRows); };
        const auto panel_at = [&](int64_t i) { return min_of(panels, cut(groups, i, pieces) * kPanelsAtOnce); };
        multiply(a, parts, {row_at(block), row_at(block + 1), panel_at(piece), panel_at(piece + 1)});
    });
    return kOk;
}

#else

int linear_amx(const LinearArgs&) { return kNoMemory; }

#endif
