// Work over OpenMP threads. The library is linked against no OpenMP runtime: it uses the one that torch has
// loaded, so that its threads are torch's threads.
#pragma once

#include <omp.h>

#include <cstdint>

inline int thread_count = 1;

// Calls work(begin, end) over [0, items), cut into pieces of at least ``grain`` items.
template <typename Work>
void parallel_ranges(int64_t items, int64_t grain, Work work) {
    const int64_t most = items / grain;
    const int parts = most < thread_count ? int(most) : thread_count;
    if (parts < 2) {
        work(int64_t(0), items);
        return;
    }
#pragma omp parallel for num_threads(thread_count) schedule(static, 1)
    for (int part = 0; part < parts; part++) work(items * part / parts, items * (part + 1) / parts);
}

// Calls work(item, thread) for each of [0, items), in any order.
template <typename Work>
void parallel_items(int64_t items, bool worth_it, Work work) {
    if (!worth_it || items < 2 || thread_count < 2) {
        for (int64_t item = 0; item < items; item++) work(item, 0);
        return;
    }
#pragma omp parallel for num_threads(thread_count) schedule(dynamic, 1)
    for (int64_t item = 0; item < items; item++) work(item, omp_get_thread_num());
}
