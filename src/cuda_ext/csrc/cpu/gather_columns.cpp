// The ranks' columns of a matrix, put side by side.
#include <algorithm>
#include <cstring>

#include "shared_region.h"

namespace {

// Floats [begin, begin + count) of a rank's [rows, width] → out, whose rows are stride apart.
void place(float* out, int64_t stride, const float* part, int64_t width, int64_t begin, int64_t count) {
    for (int64_t at = begin, end = begin + count; at < end;) {
        const int64_t row = at / width, column = at % width, length = std::min(width - column, end - at);
        std::memcpy(out + row * stride + column, part + (at - begin), sizeof(float) * length);
        at += length;
    }
}

}  // namespace

extern "C" EXPORT int shoal_gather_columns(const GatherColumnsArgs* a) {
    const RegionMember& me = *static_cast<const RegionMember*>(a->member);
    int64_t widest = 0, stride = 0;
    for (int64_t rank = 0; rank < me.ranks; rank++) {
        widest = std::max(widest, a->widths[rank]);
        stride += a->widths[rank];
    }
    for (int64_t begin = 0; begin < a->rows * widest; begin += me.chunk) {
        const auto count = [&](int64_t rank) {
            return std::clamp(a->rows * a->widths[rank] - begin, int64_t(0), me.chunk);
        };
        const Round round(a->region, me);
        if (count(me.rank)) std::memcpy(round.slot(me.rank), a->x + begin, sizeof(float) * count(me.rank));
        if (!round.meet()) return kPeerLost;
        if (!a->out) continue;
        float* out = a->out;
        for (int64_t rank = 0; rank < me.ranks; out += a->widths[rank++])
            place(out, stride, round.slot(rank), a->widths[rank], begin, count(rank));
    }
    return kOk;
}
