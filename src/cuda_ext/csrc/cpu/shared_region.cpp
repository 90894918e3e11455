// Ranks that wait for each other: they look out for a moment, then sleep, and look whether all are still alive.
#include "shared_region.h"

#include <poll.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include <atomic>

#include "look_out.h"

struct alignas(64) Progress {
    std::atomic<uint32_t> meetings;  // that the rank has come to
    std::atomic<uint32_t> sleepers;  // who wait for it
    uint32_t rounds;                 // that it has begun; nobody else reads this
};

struct Region {
    alignas(64) std::atomic<uint32_t> closed;
    Progress ranks[kMostRanks];  // of which there are as many as ranks; the slots follow
};

namespace {

constexpr int64_t kLookOut_ns = 20'000;
constexpr int64_t kNap_ns = 50'000'000;
constexpr int kMostNaps = 600;  // counted, not timed: a host that was suspended has not lost its ranks

// Returns when the word is woken or, soon, when it is no longer ``seen``; false after a nap without either.
bool sleep_on(std::atomic<uint32_t>& word, uint32_t seen) {
#if defined(__linux__)
    const timespec nap{0, kNap_ns};
    return syscall(SYS_futex, &word, FUTEX_WAIT, seen, &nap, nullptr, 0) == 0 || word.load() != seen;
#else
    for (int64_t until = now_ns() + kNap_ns; now_ns() < until; usleep(50))
        if (word.load() != seen) return true;
    return false;
#endif
}

void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

bool has_any_exited(const RegionMember& me) {
    pollfd exits[kMostRanks];
    for (int64_t rank = 0; rank < me.ranks; rank++) exits[rank] = {int(me.exits[rank]), POLLIN, 0};
    return poll(exits, nfds_t(me.ranks), 0) > 0;
}

}  // namespace

Round::Round(void* region, const RegionMember& me) : region_(*static_cast<Region*>(region)), me_(me) {
    float* first = reinterpret_cast<float*>(&region_.ranks[me.ranks]);
    slots_ = first + region_.ranks[me.rank].rounds++ % 2 * me.ranks * me.chunk;
}

bool Round::meet() const {
    Progress& mine = region_.ranks[me_.rank];
    const uint32_t meeting = mine.meetings.load() + 1;
    mine.meetings.store(meeting);
    if (mine.sleepers.load()) wake(mine.meetings);
    for (int64_t rank = 0; rank < me_.ranks; rank++)
        if (!wait_for(rank, meeting)) return false;
    return true;
}

bool Round::wait_for(int64_t rank, uint32_t meeting) const {
    Progress& theirs = region_.ranks[rank];
    const auto has_come = [&](uint32_t seen) { return int32_t(seen - meeting) >= 0; };
    if (look_out_for(kLookOut_ns, [&] { return has_come(theirs.meetings.load()); })) return true;
    theirs.sleepers++;
    bool came = false, gone = false;
    for (int naps = 0; naps < kMostNaps && !came && !gone;) {
        // Looked at first: a rank may leave as soon as all have come.
        gone = region_.closed.load();
        const uint32_t seen = theirs.meetings.load();
        came = has_come(seen);
        if (came || gone || sleep_on(theirs.meetings, seen)) continue;
        naps++;
        gone = has_any_exited(me_);
        came = has_come(theirs.meetings.load());
    }
    theirs.sleepers--;
    return came;
}

// Nobody waits for this rank any more. May be called again.
extern "C" EXPORT void shoal_leave_region(void* region, int64_t ranks) {
    Region& left = *static_cast<Region*>(region);
    left.closed.store(1);
    for (int64_t rank = 0; rank < ranks; rank++) wake(left.ranks[rank].meetings);
}
