// CUDA's language for g++: a kernel's blocks run one after the other, the threads of a block as fibres that take turns
// at barriers and at what a warp does together. Only what the kernels use is there.
//
// Blocks have whole warps, and a warp's threads do together what they do together: no masks.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __noinline__
#define __shared__ static
#define __align__(bytes) alignas(bytes)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
    uint32_t x, y;
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {

struct Place {
    dim3 thread, block, block_size, grid_size;
};

constexpr int kWarp = 32;
constexpr int kMostColumns = 256;  // of a product of wgmma
constexpr uint16_t kNan = 0x7fff;  // in bfloat16 and in half precision

// A copy that cp.async has been asked for, 16 bytes or zeros.
struct Copy {
    void* to;
    const void* from;
};

// A warp's part of a product that wgmma has been asked for: 16 rows times ``columns`` columns, the step-th 16 elements of
// each. panel: 0 where a column is a row of 64 elements in shared memory, else how far apart panels of 64 columns are, in
// elements. sums and left: this lane's, as mma's; or left_rows, the 64 rows of the warpgroup's left side.
struct Product {
    float* sums;
    const uint32_t* left;
    const uint16_t* left_rows;
    const uint16_t* right;
    int columns, step, panel;
    bool adds, is_bfloat16;
};

const Place& here();
void* dynamic_shared();

void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);

// Of all blocks of a cluster.
void cluster_barrier(const char* file, int line);

// What lies in the rank-th block of the cluster where ``mine`` lies in this block's dynamic memory.
void* memory_of(int rank, const void* mine);

// A thread's turn ends; for loops that wait for another block.
void spin();

// mine → theirs of lane ``from``. At most 16 bytes; orders no memory.
void shuffle(const void* mine, void* theirs, int bytes, int from);

// Bit i: lane i's.
uint32_t ballot(bool mine);

// Every lane's pointer, in lane order.
void gather(const void* mine, const void** all);

// The product of m16n8k16, added to sums; fragments as PTX has them, elements of bfloat16 or half precision.
void multiply(float* sums, const uint32_t* a, const uint32_t* b, bool is_bfloat16);

void copy_later(const Copy& copy);
void commit_copies();

// The oldest copy that is not among the ``groups`` last committed ones, or null.
const Copy* copy_due(int groups);

// What a thread's copies left in shared memory is shown to products by that thread; until then they read NaN there.
void show_copies();
bool is_shown(const void* shared);

// As mbarriers: a phase ends with its last arrival; who waits for one waits for the next of its parity.
void start_mbarrier(uint64_t* at, int arrivals);
void arrive_at_mbarrier(uint64_t* at);
void wait_for_mbarrier(uint64_t* at, int parity);

// From here until the product is due its sums are NaN; for good where its group was not begun, or where its right side is
// not at a multiple of 1024 bytes.
void begin_products();
void multiply_later(const Product& product);
void commit_products();

// The oldest product that is not among the ``groups`` last committed ones, or null; then every lane gives its parts of the
// left side and of the right side, columns lane, lane + 32, …, which are read that late.
const Product* product_due(int groups);
void multiply_due(const uint32_t (&left)[4], const uint16_t (*right)[16]);

using Body = void (*)(const void* context);

// Runs all threads. False where they wait for each other for ever; then ``error`` names who waits where. cluster: blocks
// side by side along z that form one. context: ``bytes`` of it are kept until the launch has run.
bool run(const char* name, dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, Body body, const void* context,
         size_t bytes);

// Launches from begin_together on run when end_together is called, all of their blocks taking turns.
void begin_together();
bool end_together();

// From now on a loop that waits in vain waits on: what it waits for may come from another process.
void wait_for_other_processes();

const char* error();

}  // namespace emulation

#define threadIdx (emulation::here().thread)
#define blockIdx (emulation::here().block)
#define blockDim (emulation::here().block_size)
#define gridDim (emulation::here().grid_size)
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)
#define __syncwarp() emulation::warp_barrier(__FILE__, __LINE__)

template <typename T>
T __shfl_xor_sync(unsigned, T mine, int mask) {
    T theirs;
    emulation::shuffle(&mine, &theirs, sizeof(T), int(threadIdx.x % emulation::kWarp) ^ mask);
    return theirs;
}

template <typename T>
T __shfl_up_sync(unsigned, T mine, int distance) {
    const int lane = int(threadIdx.x % emulation::kWarp);
    T theirs;
    emulation::shuffle(&mine, &theirs, sizeof(T), lane < distance ? lane : lane - distance);
    return theirs;
}

template <typename T>
T __shfl_sync(unsigned, T mine, int from) {
    T theirs;
    emulation::shuffle(&mine, &theirs, sizeof(T), from);
    return theirs;
}

inline uint32_t __ballot_sync(unsigned, bool mine) { return emulation::ballot(mine); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

// Byte i of the result is the one that nibble i of ``selector`` names, of low's four and then of high's.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t made = 0;
    for (int i = 0; i < 4; i++) made |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return made;
}

inline int __ffs(uint32_t bits) { return __builtin_ffs(int(bits)); }

template <typename T>
T atomicAdd(T* at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

inline int atomicCAS(int* at, int expected, int wanted) {
    __atomic_compare_exchange_n(at, &expected, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
