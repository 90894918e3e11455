// The helper threads: they look for a new job for a moment, then sleep.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>

#include "look_out.h"

namespace {

constexpr int64_t kLookOut_ns = 50'000;  // the operators of a step follow each other in less
constexpr uint32_t kClosed = UINT32_MAX;
constexpr uint32_t kFewItems = 31;

typedef void (*Run)(const void*, int64_t, int);

// The job of a generation. ``state`` is the generation and what is taken, in one word, so that an item
// can only be taken of the generation whose fields were read. It is closed while they are written. What is taken: of few items
// a bit for each, and a thread first takes those of its own part, which the last operator or one before may have left in its
// caches; of more how many, in their order.
struct Job {
    std::atomic<uint64_t> state{kClosed};
    std::atomic<Run> run{nullptr};
    std::atomic<const void*> work{nullptr};
    std::atomic<uint32_t> items{0};
    std::atomic<int> threads{0};
    std::atomic<uint32_t> finished{0};
};

Job job;
int wanted_threads = 1;
int started_threads = 1;
std::atomic<int> cpu_of[kMostThreads];  // -1: any
std::atomic<int> asleep{0};
std::atomic<bool> caller_sleeps{false};
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t new_job = PTHREAD_COND_INITIALIZER;
pthread_cond_t job_finished = PTHREAD_COND_INITIALIZER;

uint32_t generation_of(uint64_t state) { return uint32_t(state >> 32); }
uint64_t state_of(uint32_t generation, uint32_t taken) { return uint64_t(generation) << 32 | taken; }

void finish_item(uint32_t items) {
    if (job.finished.fetch_add(1) + 1 != items || !caller_sleeps.load()) return;
    pthread_mutex_lock(&mutex);
    pthread_cond_signal(&job_finished);
    pthread_mutex_unlock(&mutex);
}

bool is_closed(uint64_t state) { return uint32_t(state) == kClosed; }

// Of the items that are not taken the one for a thread; none is left: ``items``.
uint32_t choose(uint32_t taken, uint32_t items, uint32_t thread, uint32_t threads) {
    if (items > kFewItems) return taken;
    const uint32_t left = ~taken & ((1u << items) - 1), end = uint32_t(cut(items, thread + 1, threads));
    if (!left) return items;
    const uint32_t own = left & ((1u << end) - (1u << cut(items, thread, threads)));
    return own ? uint32_t(__builtin_ctz(own)) : 31 - uint32_t(__builtin_clz(left));
}

// Does items until none is left; returns the last generation that it saw open.
uint32_t take_items(int thread) {
    for (;;) {
        uint64_t state = job.state.load();
        if (is_closed(state)) return generation_of(state) - 1;
        const Run run = job.run.load();
        const void* work = job.work.load();
        const uint32_t items = job.items.load();
        const int threads = job.threads.load();
        if (thread >= threads) return generation_of(state);
        const uint32_t item = choose(uint32_t(state), items, uint32_t(thread), uint32_t(threads));
        if (item >= items) return generation_of(state);
        if (!job.state.compare_exchange_weak(state, state + (items > kFewItems ? 1 : 1u << item))) continue;
        run(work, item, thread);
        finish_item(items);
    }
}

bool opened_after(uint32_t generation) {
    const uint64_t state = job.state.load();
    return generation_of(state) != generation && !is_closed(state);
}

void sleep_until_after(uint32_t generation) {
    pthread_mutex_lock(&mutex);
    asleep++;
    while (!opened_after(generation)) pthread_cond_wait(&new_job, &mutex);
    asleep--;
    pthread_mutex_unlock(&mutex);
}

// Follows what set_threads said last. Where the processor is not to be had, the thread runs where it may.
int stay_on(int cpu, int before) {
    if (cpu == before || cpu < 0) return before;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return cpu;
}

void* help(void* thread) {
    const auto number = reinterpret_cast<intptr_t>(thread);
    for (int cpu = -1;;) {
        cpu = stay_on(cpu_of[number].load(std::memory_order_relaxed), cpu);
        const uint32_t seen = take_items(int(reinterpret_cast<intptr_t>(thread)));
        if (!look_out_for(kLookOut_ns, [seen] { return opened_after(seen); })) sleep_until_after(seen);
    }
    return nullptr;
}

// Signals are the caller's. Where a thread cannot be had, the others do its part.
void start_helpers() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (; started_threads < wanted_threads; started_threads++) {
        pthread_t id;
        if (pthread_create(&id, &detached, help, reinterpret_cast<void*>(intptr_t(started_threads)))) break;
    }
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void publish(int64_t items, Run run, const void* work) {
    const uint32_t generation = generation_of(job.state.load()) + 1;
    job.state.store(state_of(generation, kClosed));
    job.run.store(run);
    job.work.store(work);
    job.items.store(uint32_t(items));
    job.threads.store(wanted_threads);
    job.finished.store(0);
    job.state.store(state_of(generation, 0));
    if (asleep.load() == 0) return;
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&new_job);
    pthread_mutex_unlock(&mutex);
}

void wait_for_finish(uint32_t items) {
    const auto all_finished = [items] { return job.finished.load() == items; };
    if (look_out_for(kLookOut_ns, all_finished)) return;
    pthread_mutex_lock(&mutex);
    caller_sleeps = true;
    while (!all_finished()) pthread_cond_wait(&job_finished, &mutex);
    caller_sleeps = false;
    pthread_mutex_unlock(&mutex);
}

}  // namespace

void set_threads(int count, const int* cpus) {
    wanted_threads = count < 1 ? 1 : count < kMostThreads ? count : kMostThreads;
    for (int i = 0; i < wanted_threads; i++) cpu_of[i].store(cpus ? cpus[i] : -1, std::memory_order_relaxed);
}

int thread_count() { return wanted_threads; }

void run_on_threads(int64_t items, Run run, const void* work) {
    if (started_threads < wanted_threads) start_helpers();
    publish(items, run, work);
    take_items(0);
    wait_for_finish(uint32_t(items));
}
