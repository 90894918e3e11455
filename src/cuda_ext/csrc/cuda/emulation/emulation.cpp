// The scheduler of emulation.h. Compiled without ThreadSanitizer: what fibres share here is no kernel's memory.
#include "emulation.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "fibre.h"
#include "types.h"

namespace emulation {

namespace {

enum class State { kReady, kAtBarrier, kAtWarp, kDone };
enum class Together { kNothing, kBarrier, kShuffle, kBallot, kGather, kMultiply, kMultiplyGroup };

constexpr const char* kNames[] = {"nothing", "__syncwarp", "a shuffle", "a vote", "ldmatrix", "mma", "wgmma"};
constexpr int kSlotBytes = 16;
constexpr int kMostIdleTurns = 100000, kTurnsBeforeNap = 128;

// What a thread has asked for, in order, and how much of it at each commit.
template <typename Item>
struct Queue {
    std::vector<Item> items;
    std::vector<size_t> committed;
    size_t done = 0;  // since the last time that none was left

    void commit() { committed.push_back(items.size()); }
    void clear() { *this = {}; }

    // The oldest that is not among the ``groups`` last committed ones, or null. It stays where it is until the next one.
    Item* due(size_t groups) {
        const size_t count = committed.size(), end = count > groups ? committed[count - groups - 1] : 0;
        if (done < end) return &items[done++];
        if (done == items.size()) {
            items.clear();
            std::fill(committed.begin(), committed.end(), 0);
            done = 0;
            if (count > groups) committed.erase(committed.begin(), committed.end() - ptrdiff_t(groups));
        }
        return nullptr;
    }
};

// saved: the sums before the first product of several in a row.
struct Waiting {
    Product product;
    std::vector<float> saved;
    bool is_valid;
};

// Who copied 16 bytes of shared memory, and how often it had shown its copies before.
struct Landed {
    const void* fibre = nullptr;
    int shown = 0;
};

// What lies in an mbarrier's place.
struct Phase {
    uint16_t arrivals, missing;
    uint32_t parity;
};
static_assert(sizeof(Phase) == sizeof(uint64_t));

struct Fragments {
    uint32_t a[4], b[2];
    float* sums;
    bool is_bfloat16;
};

struct Warp {
    unsigned char slots[2][kWarp][kSlotBytes];
    Fragments fragments[kWarp];
    uint32_t votes[2];
    const void* pointers[2][kWarp];
    const Product* products[kWarp];
    uint32_t left[kWarp][4];
    uint16_t right[kMostColumns][16];
    int arrived = 0, size = 0;
    Together kind = Together::kNothing;
};

struct Launch;
struct Block;

struct Cluster {
    std::vector<Block*> blocks;  // by rank
    int arrived = 0, line = 0;
};

constexpr size_t kSharedAlignment = 1024, kCopied = 16;

struct FreeShared {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t(kSharedAlignment)); }
};

struct Block {
    Launch* launch;
    dim3 index;
    std::shared_ptr<Cluster> cluster;
    size_t first = 0;  // of its fibres
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[], FreeShared> dynamic;  // as long as a thread lives
    unsigned char* shared = nullptr;
    std::vector<Landed> landed;  // of each 16 bytes of dynamic memory
    int arrived = 0, live = 0, line = 0;
};

struct Fibre {
    Stack stack;
    State state = State::kReady;
    Block* block = nullptr;
    Warp* warp = nullptr;
    Place place;
    int lane = 0, turn = 0, line = 0;
    const char* what = "";
    Queue<Copy> copies;
    Queue<Waiting> products;
    Waiting* due = nullptr;
    bool has_begun = false;  // a group of products
    int shown = 0;           // how often, its copies
    const void* waits_for = nullptr;
};

struct Launch {
    const char* name;
    dim3 grid;
    unsigned cluster;
    dim3 block;
    size_t shared_bytes;
    Body body;
    std::vector<unsigned char> context;
};

std::mutex busy;
std::vector<std::unique_ptr<Fibre>> fibres;  // the pool; the first ``running`` take part
size_t running = 0, current = 0, undone = 0;
int idle_turns = 0;
bool stuck = false, together = false, has_peers = false;
Stack host;
std::vector<Launch> waiting;
char message[1024];

Fibre& me() { return *fibres[current]; }

// The next fibre that can go on, or the host where there is none.
void next_turn(bool leaves) {
    Fibre& mine = me();
    for (size_t step = 1; step <= running; step++) {
        const size_t index = current + step < running ? current + step : current + step - running;
        if (fibres[index]->state != State::kReady) continue;
        if (index == current) return;
        current = index;
        change(mine.stack, fibres[index]->stack, leaves);
        return;
    }
    stuck = undone > 0;
    change(mine.stack, host, leaves);
}

void finish() {
    Fibre& mine = me();
    release(mine.block->launch);
    mine.state = State::kDone;
    release(&mine.block->live);
    if (--mine.block->live == 0) {
        acquire(&mine.block->live);
        mine.block->dynamic.reset();
    }
    undone--;
    idle_turns = 0;
    next_turn(true);
    std::abort();  // a finished fibre has no turn
}

void entry() {
    Fibre& mine = me();
    arrived(mine.stack);
    acquire(mine.block->launch);
    mine.block->launch->body(mine.block->launch->context.data());
    finish();
}

// Waits for the other lanes; true for the last one, which goes on at once.
bool meet_warp(Together kind, int line) {
    Fibre& mine = me();
    Warp& warp = *mine.warp;
    if (warp.arrived == 0) warp.kind = kind;
    mine.what = kNames[int(kind)];
    mine.line = line;
    if (warp.kind == kind && ++warp.arrived == warp.size) {
        warp.arrived = 0;
        for (int lane = 0; lane < warp.size; lane++) fibres[current - mine.lane + lane]->state = State::kReady;
        return true;
    }
    mine.state = State::kAtWarp;
    next_turn(false);
    return false;
}

void name_deadlock() {
    int waits[2] = {}, done = 0;
    const Fibre* example[2] = {};
    for (size_t i = 0; i < running; i++) {
        const Fibre& fibre = *fibres[i];
        if (fibre.state == State::kDone) {
            done++;
            continue;
        }
        const bool differs = example[0] && (fibre.line != example[0]->line || fibre.what != example[0]->what);
        waits[differs]++;
        if (!example[differs]) example[differs] = &fibre;
    }
    const dim3 block = example[0]->place.block;
    int used = std::snprintf(message, sizeof message,
                             "deadlock in %s, block (%u, %u, %u): %d threads wait at %s (line %d)",
                             example[0]->block->launch->name, block.x, block.y, block.z, waits[0], example[0]->what,
                             example[0]->line);
    if (example[1])
        used += std::snprintf(message + used, sizeof message - used, ", %d at %s (line %d) and elsewhere", waits[1],
                              example[1]->what, example[1]->line);
    std::snprintf(message + used, sizeof message - used, ", %d have ended", done);
}

dim3 unfold(size_t index, dim3 size) {
    return {unsigned(index % size.x), unsigned(index / size.x % size.y), unsigned(index / size.x / size.y)};
}

size_t count_of(dim3 size) { return size_t(size.x) * size.y * size.z; }

void place_threads(Block& block, size_t first) {
    const Launch& launch = *block.launch;
    const size_t threads = count_of(launch.block);
    block.warps.resize((threads + kWarp - 1) / kWarp);
    block.first = first;
    block.dynamic.reset(new (std::align_val_t(kSharedAlignment)) unsigned char[launch.shared_bytes]);
    block.shared = block.dynamic.get();
    std::fill_n(block.shared, launch.shared_bytes, 0xff);
    block.landed.assign(launch.shared_bytes / kCopied + 1, {});
    block.live = int(threads);
    while (fibres.size() < first + threads) {
        fibres.push_back(std::make_unique<Fibre>());
        make_stack(fibres.back()->stack);
    }
    for (size_t i = 0; i < threads; i++) {
        Fibre& fibre = *fibres[first + i];
        fibre.state = State::kReady;
        fibre.block = &block;
        fibre.warp = &block.warps[i / kWarp];
        fibre.warp->size++;
        fibre.lane = int(i % kWarp);
        fibre.turn = 0;
        fibre.place = {unfold(i, launch.block), block.index, launch.block, launch.grid};
        fibre.copies.clear();
        fibre.products.clear();
        fibre.has_begun = false;
        fibre.shown = 0;
        rewind(fibre.stack, entry);
    }
}

// All threads of the blocks take turns until they are done.
bool run_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
    running = 0;
    host.announced = nullptr;  // any thread of the system may call
    for (auto& block : blocks) {
        place_threads(*block, running);
        running += count_of(block->launch->block);
        release(block->launch);
    }
    undone = running;
    current = 0;
    idle_turns = 0;
    stuck = false;
    if (running) change(host, fibres[0]->stack, false);
    for (auto& block : blocks) acquire(block->launch);
    if (stuck) name_deadlock();
    return !stuck;
}

}  // namespace

const Place& here() { return me().place; }
void* dynamic_shared() { return me().block->shared; }

void barrier(const char*, int line) {
    Fibre& mine = me();
    Block& block = *mine.block;
    if (block.arrived == 0) block.line = line;
    mine.what = "__syncthreads";
    mine.line = line;
    release(&block);
    const int threads = int(count_of(block.launch->block));
    if (block.line == line && ++block.arrived == threads) {
        block.arrived = 0;
        for (int i = 0; i < threads; i++) fibres[block.first + i]->state = State::kReady;
        idle_turns = 0;
    } else {
        mine.state = State::kAtBarrier;
        next_turn(false);
    }
    acquire(&block);
}

void cluster_barrier(const char*, int line) {
    Fibre& mine = me();
    Cluster& cluster = *mine.block->cluster;
    if (cluster.arrived == 0) cluster.line = line;
    mine.what = "a cluster's barrier";
    mine.line = line;
    release(&cluster);
    const size_t threads = count_of(mine.block->launch->block);
    if (cluster.line == line && ++cluster.arrived == int(threads * cluster.blocks.size())) {
        cluster.arrived = 0;
        for (const Block* block : cluster.blocks)
            for (size_t i = 0; i < threads; i++) fibres[block->first + i]->state = State::kReady;
        idle_turns = 0;
    } else {
        mine.state = State::kAtBarrier;
        next_turn(false);
    }
    acquire(&cluster);
}

void* memory_of(int rank, const void* mine) {
    const Block& block = *me().block;
    const auto offset = static_cast<const unsigned char*>(mine) - block.shared;
    return block.cluster->blocks[size_t(rank)]->shared + offset;
}

void warp_barrier(const char*, int line) {
    Warp* warp = me().warp;
    release(warp);
    meet_warp(Together::kBarrier, line);
    acquire(warp);
}

void start_mbarrier(uint64_t* at, int arrivals) {
    *reinterpret_cast<Phase*>(at) = {uint16_t(arrivals), uint16_t(arrivals), 0};
}

void arrive_at_mbarrier(uint64_t* at) {
    release(at);
    auto& phase = *reinterpret_cast<Phase*>(at);
    if (--phase.missing > 0) return;
    phase.missing = phase.arrivals;
    phase.parity ^= 1;
    const Block& block = *me().block;
    for (size_t i = 0; i < count_of(block.launch->block); i++) {
        Fibre& fibre = *fibres[block.first + i];
        if (fibre.waits_for == at) fibre.state = State::kReady;
    }
    idle_turns = 0;
}

void wait_for_mbarrier(uint64_t* at, int parity) {
    Fibre& mine = me();
    mine.what = "an mbarrier";
    mine.line = 0;
    mine.waits_for = at;
    while (int(reinterpret_cast<const Phase*>(at)->parity) == parity) {
        mine.state = State::kAtBarrier;
        next_turn(false);
    }
    mine.waits_for = nullptr;
    acquire(at);
}

void wait_for_other_processes() { has_peers = true; }

void spin() {
    if (has_peers && ++idle_turns % kTurnsBeforeNap == 0) sched_yield();
    if (!has_peers && ++idle_turns > kMostIdleTurns) {
        me().what = "another block's sign";
        me().line = 0;
        stuck = true;
        change(me().stack, host, false);
    }
    next_turn(false);
}

// Two sets of slots by turns: who meets again has read what it met for.
void shuffle(const void* mine, void* theirs, int bytes, int from) {
    Fibre& fibre = me();
    auto& slots = fibre.warp->slots[fibre.turn ^= 1];
    const auto* in = static_cast<const unsigned char*>(mine);
    auto* out = static_cast<unsigned char*>(theirs);
    for (int i = 0; i < bytes; i++) slots[fibre.lane][i] = in[i];
    meet_warp(Together::kShuffle, 0);
    for (int i = 0; i < bytes; i++) out[i] = slots[from][i];
}

uint32_t ballot(bool mine) {
    Fibre& fibre = me();
    const int turn = fibre.turn ^= 1;
    if (fibre.warp->arrived == 0) fibre.warp->votes[turn] = 0;
    fibre.warp->votes[turn] |= uint32_t(mine) << fibre.lane;
    meet_warp(Together::kBallot, 0);
    return fibre.warp->votes[turn];
}

void gather(const void* mine, const void** all) {
    Fibre& fibre = me();
    auto& pointers = fibre.warp->pointers[fibre.turn ^= 1];
    pointers[fibre.lane] = mine;
    meet_warp(Together::kGather, 0);
    for (int lane = 0; lane < kWarp; lane++) all[lane] = pointers[lane];
}

static double widened(uint16_t bits, bool is_bfloat16) {
    return double(is_bfloat16 ? to_float(bf16{bits}) : to_float(fp16{bits}));
}

// Exactly, and rounded once.
static float product_sum(float before, const double (&a)[16], const double (&b)[16]) {
    double sum = double(before);
    for (int k = 0; k < 16; k++) sum += a[k] * b[k];
    return float(sum);
}

static void multiply_all(Warp& warp) {
    double a[16][16], b[8][16];
    for (int lane = 0; lane < kWarp; lane++) {
        const Fragments& f = warp.fragments[lane];
        const auto widen = [&f](uint32_t pair, int half) { return widened(uint16_t(pair >> 16 * half), f.is_bfloat16); };
        const int row = lane / 4, column = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++) a[row + i % 2 * 8][column + i / 2 * 8 + half] = widen(f.a[i], half);
            for (int i = 0; i < 2; i++) b[row][column + i * 8 + half] = widen(f.b[i], half);
        }
    }
    for (int lane = 0; lane < kWarp; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float& sum = warp.fragments[lane].sums[i];
            sum = product_sum(sum, a[row], b[column]);
        }
}

void multiply(float* sums, const uint32_t* a, const uint32_t* b, bool is_bfloat16) {
    Fibre& fibre = me();
    Fragments& mine = fibre.warp->fragments[fibre.lane];
    std::copy_n(a, 4, mine.a);
    std::copy_n(b, 2, mine.b);
    mine.sums = sums;
    mine.is_bfloat16 = is_bfloat16;
    if (meet_warp(Together::kMultiply, 0)) multiply_all(*fibre.warp);
}

// Of 16 bytes in this block's dynamic memory.
static size_t place_of(const void* shared) {
    return size_t(static_cast<const unsigned char*>(shared) - me().block->shared) / kCopied;
}

void copy_later(const Copy& copy) { me().copies.items.push_back(copy); }
void commit_copies() { me().copies.commit(); }

const Copy* copy_due(int groups) {
    Fibre& mine = me();
    const Copy* copy = mine.copies.due(size_t(groups));
    const size_t place = copy ? place_of(copy->to) : 0;
    if (copy && place < mine.block->landed.size()) mine.block->landed[place] = {&mine, mine.shown};
    return copy;
}

void show_copies() { me().shown++; }

bool is_shown(const void* shared) {
    const size_t place = place_of(shared);
    if (place >= me().block->landed.size()) return true;
    const Landed& landed = me().block->landed[place];
    return !landed.fibre || static_cast<const Fibre*>(landed.fibre)->shown > landed.shown;
}

void begin_products() { me().has_begun = true; }

void multiply_later(const Product& product) {
    auto& products = me().products;
    const auto begin = products.items.begin() + ptrdiff_t(products.done);
    const bool goes_on = std::any_of(begin, products.items.end(),
                                     [&](const Waiting& other) { return other.product.sums == product.sums; });
    const auto is_in_place = [](const void* rows) { return reinterpret_cast<uintptr_t>(rows) % kSharedAlignment == 0; };
    const bool is_aligned = is_in_place(product.right) && is_in_place(product.left_rows);
    Waiting waiting{product, {}, me().has_begun && is_aligned};
    if (!goes_on) {
        float *sums = product.sums, *end = sums + product.columns / 2;
        waiting.saved.assign(sums, end);
        std::fill(sums, end, std::nanf(""));
    }
    products.items.push_back(std::move(waiting));
}

void commit_products() {
    me().products.commit();
    me().has_begun = false;
}

const Product* product_due(int groups) {
    Fibre& mine = me();
    mine.due = mine.products.due(size_t(groups));
    return mine.due ? &mine.due->product : nullptr;
}

static void multiply_group(Warp& warp) {
    double a[16][16], b[16];
    const Product& shape = *warp.products[0];
    for (int lane = 0; lane < kWarp; lane++) {
        const uint32_t* left = warp.left[lane];
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + half] =
                    widened(uint16_t(left[i] >> 16 * half), shape.is_bfloat16);
    }
    for (int column = 0; column < shape.columns; column++) {
        for (int k = 0; k < 16; k++) b[k] = widened(warp.right[column][k], shape.is_bfloat16);
        for (int row = 0; row < 16; row++) {
            const int lane = row % 8 * 4 + column % 8 / 2, place = column / 8 * 4 + row / 8 * 2 + column % 2;
            float& sum = warp.products[lane]->sums[place];
            sum = product_sum(shape.adds ? sum : 0.0f, a[row], b);
        }
    }
}

void multiply_due(const uint32_t (&left)[4], const uint16_t (*right)[16]) {
    Fibre& mine = me();
    std::copy(mine.due->saved.begin(), mine.due->saved.end(), mine.due->product.sums);
    mine.warp->products[mine.lane] = &mine.due->product;
    std::copy_n(left, 4, mine.warp->left[mine.lane]);
    for (int i = 0, column = mine.lane; column < mine.due->product.columns; i++, column += kWarp)
        std::copy_n(right[i], 16, mine.warp->right[column]);
    if (meet_warp(Together::kMultiplyGroup, 0)) multiply_group(*mine.warp);
    if (!mine.due->is_valid) std::fill_n(mine.due->product.sums, mine.due->product.columns / 2, std::nanf(""));
}

static size_t clusters_of(const Launch& launch) { return count_of(launch.grid) / launch.cluster; }

// Appends the blocks of the index-th cluster.
static void add_cluster(Launch& launch, size_t index, std::vector<std::unique_ptr<Block>>& to) {
    const dim3 place = unfold(index, {launch.grid.x, launch.grid.y, launch.grid.z / launch.cluster});
    const auto cluster = std::make_shared<Cluster>();
    for (unsigned rank = 0; rank < launch.cluster; rank++) {
        to.push_back(std::make_unique<Block>());
        to.back()->launch = &launch;
        to.back()->index = {place.x, place.y, place.z * launch.cluster + rank};
        to.back()->cluster = cluster;
        cluster->blocks.push_back(to.back().get());
    }
}

static bool run_in_order(Launch& launch) {
    for (size_t i = 0; i < clusters_of(launch); i++) {
        std::vector<std::unique_ptr<Block>> blocks;
        add_cluster(launch, i, blocks);
        if (!run_blocks(blocks)) return false;
    }
    return true;
}

bool run(const char* name, dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, Body body, const void* context,
         size_t bytes) {
    const std::lock_guard<std::mutex> lock(busy);
    const auto* first = static_cast<const unsigned char*>(context);
    Launch launch{name, grid, cluster, block, shared_bytes, body, {first, first + bytes}};
    if (together) {
        waiting.push_back(std::move(launch));
        return true;
    }
    return run_in_order(launch);
}

void begin_together() {
    const std::lock_guard<std::mutex> lock(busy);
    together = true;
    waiting.clear();
}

bool end_together() {
    const std::lock_guard<std::mutex> lock(busy);
    together = false;
    std::vector<std::unique_ptr<Block>> blocks;
    for (Launch& launch : waiting)
        for (size_t i = 0; i < clusters_of(launch); i++) add_cluster(launch, i, blocks);
    return run_blocks(blocks);
}

const char* error() { return message; }

}  // namespace emulation
