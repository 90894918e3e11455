// Work over threads. Launchers are called from one thread, which takes part.
//
// The library has its own helpers: OpenMP waits until every thread has come, so one that another process keeps
// from its core holds up each operator for a time slice. Here the caller begins at once, helpers that are awake
// take items from it, and it waits only for items that somebody has begun.
#pragma once

#include <cstdint>

constexpr int kMostThreads = 256;

// cpus: one a thread, where helpers stay; the first is the caller's own, which goes where it likes. Or null.
void set_threads(int count, const int* cpus);
int thread_count();

// Calls run(work, item, thread) for each of [0, items), in any order, on up to thread_count() threads.
void run_on_threads(int64_t items, void (*run)(const void* work, int64_t item, int thread), const void* work);

// Static: of a copy that is compiled for a higher level no other file may make use.
static inline int64_t at_least_one(int64_t n) { return n > 1 ? n : 1; }

// Where the part-th of ``parts`` parts of about the same size begins.
static inline int64_t cut(int64_t items, int64_t part, int64_t parts) { return items * part / parts; }

// Into how many of at most ``most`` pieces each of ``blocks`` is cut, for ``items_a_thread`` items a thread; ``useful``:
// pieces beyond which handing one out costs more than it saves.
static inline int64_t pieces_of(int64_t blocks, int64_t items_a_thread, int64_t useful, int64_t most) {
    if (thread_count() < 2) return 1;
    const int64_t wanted = (thread_count() * items_a_thread + blocks - 1) / blocks, allowed = useful < most ? useful : most;
    return at_least_one(wanted < allowed ? wanted : allowed);
}

// Calls work(item, thread) for each of [0, items), in any order.
template <typename Work>
void parallel_items(int64_t items, bool worth_it, const Work& work) {
    if (!worth_it || items < 2 || thread_count() < 2) {
        for (int64_t item = 0; item < items; item++) work(item, 0);
        return;
    }
    run_on_threads(
        items,
        [](const void* it, int64_t item, int thread) { (*static_cast<const Work*>(it))(item, thread); },
        &work);
}

// Calls work(begin, end) over [0, items), cut into pieces of at least ``grain`` items.
template <typename Work>
void parallel_ranges(int64_t items, int64_t grain, const Work& work) {
    const int64_t most = items / grain, threads = thread_count();
    const int64_t parts = most < threads ? most : threads;
    if (parts < 2) {
        work(int64_t(0), items);
        return;
    }
    parallel_items(parts, true, [&](int64_t part, int) {
        work(items * part / parts, items * (part + 1) / parts);
    });
}
