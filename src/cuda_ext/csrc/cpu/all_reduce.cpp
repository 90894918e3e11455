// Sums over the ranks of one host, in the order of the ranks.
#include <algorithm>
#include <cstring>

#include "shared_region.h"

namespace {

constexpr int64_t kBlock = 2048;       // floats: stay in the first-level cache while the ranks' are added
constexpr int64_t kLine = 16;          // floats
constexpr int64_t kMeetingPays = 8192;  // floats that may rather be fetched from another core

// Adding all of it on every rank takes one meeting and fetches (ranks - 1) · count floats; sharing it out takes two
// and fetches 2 · (ranks - 1) / ranks · count.
bool pays_to_share_out(int64_t ranks, int64_t count) {
    return (ranks - 1) * (ranks - 2) * count > kMeetingPays * ranks;
}

// to: floats [begin, end) of all slots, added up; may be those of a slot.
void add_up(const Round& round, int64_t ranks, int64_t begin, int64_t end, float* to) {
    for (; begin < end; begin += kBlock, to += kBlock) {
        const int64_t count = std::min(kBlock, end - begin);
        const float *first = round.slot(0) + begin, *second = round.slot(1) + begin;
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++) to[i] = first[i] + second[i];
        for (int64_t rank = 2; rank < ranks; rank++) {
            const float* next = round.slot(rank) + begin;
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) to[i] += next[i];
        }
    }
}

// At most a chunk.
bool all_reduce(void* region, const RegionMember& me, float* x, int64_t count) {
    const Round round(region, me);
    std::memcpy(round.slot(me.rank), x, sizeof(float) * count);
    if (!round.meet()) return false;
    if (!pays_to_share_out(me.ranks, count)) {
        add_up(round, me.ranks, 0, count, x);
        return true;
    }
    const int64_t lines = (count + kLine - 1) / kLine;
    const int64_t begin = lines * me.rank / me.ranks * kLine;
    const int64_t end = std::min(lines * (me.rank + 1) / me.ranks * kLine, count);
    float* sums = round.slot(0);
    add_up(round, me.ranks, begin, end, sums + begin);
    if (!round.meet()) return false;
    std::memcpy(x, sums, sizeof(float) * count);
    return true;
}

}  // namespace

extern "C" EXPORT int shoal_all_reduce(const AllReduceArgs* a) {
    const RegionMember& me = *static_cast<const RegionMember*>(a->member);
    const int64_t count = a->rows * a->columns;
    for (int64_t done = 0; done < count; done += me.chunk)
        if (!all_reduce(a->region, me, a->x + done, std::min(me.chunk, count - done))) return kPeerLost;
    return kOk;
}
