// Many jobs of parallel.h, built with ThreadSanitizer by test_sanitizers.py. Items write plain memory that the caller
// reads afterwards: an item that is done twice, too late or by a thread that it does not say is a race or a wrong sum.
// With --race every item writes the same place.
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "parallel.h"

namespace {

constexpr int kMostItems = 97;
constexpr int kMostThreads = 6;
constexpr int kJobs = 4000;

uint64_t random_state = 12345;

uint32_t next_random(uint32_t below) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(random_state >> 33) % below;
}

void sleep_us(int64_t time_us) {
    const timespec time = {0, time_us * 1000};
    nanosleep(&time, nullptr);
}

struct Tally {
    int64_t done[kMostItems];          // by item
    int64_t by_thread[kMostThreads];   // a thread's own: never written by two at once
};

// Whether every item was done once.
bool run_job(int64_t items, int64_t slow_item, int64_t job) {
    Tally tally = {};
    parallel_items(items, true, [&](int64_t item, int thread) {
        if (item == slow_item) sleep_us(200);  // longer than the caller looks out
        tally.done[item] += job;
        tally.by_thread[thread]++;
    });
    int64_t sum = 0;
    for (int64_t of_thread : tally.by_thread) sum += of_thread;
    for (int64_t item = 0; item < items; item++)
        if (tally.done[item] != job) return false;
    return sum == items;
}

bool run_ranges(int64_t items) {
    int64_t done[kMostItems] = {};
    parallel_ranges(items, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) done[i]++;
    });
    for (int64_t item = 0; item < items; item++)
        if (done[item] != 1) return false;
    return true;
}

// Some are told where to stay, maybe on a processor that there is not.
void choose_threads() {
    const int count = 1 + int(next_random(kMostThreads));
    int cpus[kMostThreads];
    for (int& cpu : cpus) cpu = int(next_random(4));
    set_threads(count, next_random(2) ? cpus : nullptr);
}

void race() {
    set_threads(2, nullptr);
    int64_t shared = 0;
    for (int job = 0; job < 100; job++)
        parallel_items(8, true, [&](int64_t, int) {
            shared++;
            sleep_us(50);
        });
    printf("%ld\n", long(shared));
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && strcmp(arguments[1], "--race") == 0) return race(), 0;
    for (int64_t job = 1; job <= kJobs; job++) {
        if (job % 50 == 1) choose_threads();
        const int64_t items = 1 + next_random(kMostItems);
        const int64_t slow_item = next_random(40) == 0 ? int64_t(next_random(uint32_t(items))) : -1;
        if (!run_job(items, slow_item, job) || !run_ranges(items)) {
            fprintf(stderr, "job %ld: an item was not done exactly once\n", long(job));
            return 1;
        }
        if (next_random(20) == 0) sleep_us(150);  // the helpers fall asleep
    }
    printf("all items done once\n");
    return 0;
}
