// The tile products of the tensor cores, the copies that feed them, barriers in shared memory and clusters: what threads do
// together. Each wrapper is the instruction under nvcc and its emulation under g++; nothing else here knows of either.
//
// Fragments of m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), lane = 4 · g + t, pairs of 16-bit elements:
//   a[0]: row g, columns 2t, 2t+1      a[1]: row g+8      a[2], a[3]: the same rows, columns 2t+8, 2t+9
//   b[0]: column g, rows 2t, 2t+1      b[1]: rows 2t+8, 2t+9
//   c[0], c[1]: row g, columns 2t, 2t+1                    c[2], c[3]: row g+8
#pragma once

#include "device.h"

// c += a · b
template <typename T>
__device__ __forceinline__ void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
    if constexpr (std::is_same_v<T, bf16>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulation::multiply(c, a, b, std::is_same_v<T, bf16>);
#endif
}

// A float nearest to x that tf32 holds: of 11 bits.
__device__ __forceinline__ float narrowed(float x) { return float_of((bits_of(x) + 0x1000) & 0xffffe000); }

// c += a · b, m16n8k4 of what tf32 holds of floats, their first 11 bits: a[0]: row g, column t; a[1]: row g+8; b: column g,
// row t.
__device__ __forceinline__ void multiply_floats(float (&c)[4], const float (&a)[2], float b) {
#if defined(__CUDACC__)
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(b)));
#else
    const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
    double sums[4] = {c[0], c[1], c[2], c[3]};
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) {
            const float left = __shfl_sync(kAllLanes, a[i / 2], 4 * g + k);
            const float right = __shfl_sync(kAllLanes, b, 4 * (2 * t + i % 2) + k);
            sums[i] += double(float_of(bits_of(left) & 0xffffe000)) * double(float_of(bits_of(right) & 0xffffe000));
        }
    for (int i = 0; i < 4; i++) c[i] = float(sums[i]);
#endif
}

// Four 8 × 8 matrices of 16-bit elements from shared memory; lane i gives row i % 8 of matrix i / 8, 16 bytes at a
// multiple of 16. Lane 4 · g + t gets columns 2t, 2t+1 of row g of each; transposed: row g and t change places.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
#else
    const void* rows[32];
    emulation::gather(row, rows);
    const int lane = int(threadIdx.x) % 32;
    for (int i = 0; i < 4; i++) {
        const auto whole = load_whole<uint4>(rows[8 * i + lane / 4]);
        const uint32_t words[4] = {whole.x, whole.y, whole.z, whole.w};
        to[i] = words[lane % 4];
    }
#endif
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
#else
    const void* rows[32];
    emulation::gather(row, rows);
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const auto low = load_whole<Eight<uint16_t>>(rows[8 * i + 2 * t]);
        const auto high = load_whole<Eight<uint16_t>>(rows[8 * i + 2 * t + 1]);
        to[i] = uint32_t(low.of[g]) | uint32_t(high.of[g]) << 16;
    }
#endif
}

// 16 bytes of global memory to shared memory, or zeros; there once wait_for_copies and a barrier say so. WithLine: L2 may
// bring the 128 bytes around them too, which saves it work where another warp is about to ask for the rest.
template <bool WithLine = false>
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from, bool is_wanted) {
#if defined(__CUDACC__)
    const auto place = unsigned(__cvta_generic_to_shared(to));
    const int count = is_wanted ? 16 : 0;
    if constexpr (WithLine)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(count) : "memory");
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(count) : "memory");
#else
    emulation::copy_later({to, is_wanted ? from : nullptr});
#endif
}

// Ends a group of copies of this thread.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulation::commit_copies();
#endif
}

// Of all groups of this thread but the last ``Groups``.
template <int Groups>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#else
    while (const emulation::Copy* copy = emulation::copy_due(Groups))
        store_whole(copy->to, copy->from ? load_whole<uint4>(copy->from) : uint4{});
#endif
}

// All threads of a cluster's blocks, and what they wrote before. Chips older than sm_90 have none: there nobody calls it.
__device__ __forceinline__ void meet_cluster() {
#if !defined(__CUDACC__)
    emulation::cluster_barrier(__FILE__, __LINE__);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where in the rank-th block of the cluster lies what in this one is ``mine``, in shared memory.
template <typename T>
__device__ __forceinline__ const T* of_block(int rank, const T* mine) {
#if !defined(__CUDACC__)
    return static_cast<const T*>(emulation::memory_of(rank, mine));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const T* theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return theirs;
#else
    return mine;
#endif
}

// A barrier in shared memory (sm_90): phases end when as many have arrived as it was started with, and begin with 0. Who
// passes sees what those who arrived wrote before. It is started by one thread, before all others meet.
struct Mbarrier {
    uint64_t word;
};

__device__ __forceinline__ void start_barrier(Mbarrier& at, int arrivals) {
#if !defined(__CUDACC__)
    emulation::start_mbarrier(&at.word, arrivals);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(unsigned(__cvta_generic_to_shared(&at))), "r"(arrivals)
                 : "memory");
#endif
}

__device__ __forceinline__ void arrive(Mbarrier& at) {
#if !defined(__CUDACC__)
    emulation::arrive_at_mbarrier(&at.word);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(unsigned(__cvta_generic_to_shared(&at)))
                 : "memory");
#endif
}

// For the phase-th phase to end; its waiters may be one phase behind, not more.
__device__ __forceinline__ void wait_for_phase(Mbarrier& at, int phase) {
#if !defined(__CUDACC__)
    emulation::wait_for_mbarrier(&at.word, phase % 2);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const unsigned address = unsigned(__cvta_generic_to_shared(&at));
    uint32_t has_ended = 0;
    while (!has_ended)
        asm volatile("{\n.reg .pred ended;\n"
                     "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, ended;\n}"
                     : "=r"(has_ended)
                     : "r"(address), "r"(phase % 2)
                     : "memory");
#endif
}

// wgmma: a warpgroup's four warps multiply 64 rows, 16 of each warp in registers as mma's left side, with rows of 64
// elements in shared memory. There a row's 16-byte chunk c lies in the place of c ^ row % 8 (128-byte swizzling), and the
// first row at a multiple of 1024 bytes. Products are under way until they are waited for.
constexpr int kGroupRow = 64;  // elements

__host__ __device__ constexpr int swizzled(int row, int column) {
    return row * kGroupRow + (column / 8 ^ row % 8) * 8 + column % 8;
}

#if defined(__CUDACC__)
// Nothing is moved across this that reads or writes the sums.
template <int Tiles>
__device__ __forceinline__ void pin(float (&sums)[Tiles][4]) {
    UNROLL for (int n = 0; n < Tiles; n++)
        UNROLL for (int i = 0; i < 4; i++) asm volatile("" : "+f"(sums[n][i])::"memory");
}

template <int Steps>
__device__ __forceinline__ void pin(uint32_t (&left)[Steps][4]) {
    UNROLL for (int step = 0; step < Steps; step++)
        UNROLL for (int i = 0; i < 4; i++) asm volatile("" : "+r"(left[step][i])::"memory");
}
#endif

// A warpgroup keeps as many registers a thread as it says, or takes as many, and waits until others have given enough.
// Without effect where there is no wgmma.
template <int Registers>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// What is made of x is made anew after this, not once before a loop, which would keep it in registers.
__device__ __forceinline__ int made_here(int x) {
#if defined(__CUDACC__)
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// What this thread wrote to shared memory is seen by products that begin after a barrier.
__device__ __forceinline__ void show_to_products() {
#if !defined(__CUDACC__)
    emulation::show_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before each group of products: they read or add to registers that were written since the last one.
template <int Tiles>
__device__ __forceinline__ void begin_products(float (&sums)[Tiles][4]) {
#if defined(__CUDACC__)
    pin(sums);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
#else
    (void)sums;
    emulation::begin_products();
#endif
}

// left: what they have as their left side, which was written since then too.
template <int Tiles, int Steps>
__device__ __forceinline__ void begin_products(float (&sums)[Tiles][4], uint32_t (&left)[Steps][4]) {
#if defined(__CUDACC__)
    pin(left);
#else
    (void)left;
#endif
    begin_products(sums);
}

__device__ __forceinline__ void commit_products() {
#if !defined(__CUDACC__)
    emulation::commit_products();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

#if !defined(__CUDACC__)
// Element ``k`` of a product's step of its column-th column, where it lies.
inline const uint16_t* right_of(const emulation::Product& product, int column, int k) {
    const int along = 16 * product.step + k;
    if (product.panel == 0) return product.right + swizzled(column, along);
    return product.right + column / kGroupRow * product.panel + swizzled(along, column % kGroupRow);
}

inline uint16_t shown(const uint16_t* from) { return emulation::is_shown(from) ? *from : emulation::kNan; }

// Of a left side in shared memory, what a register of mma's would hold.
inline uint32_t pair_of_left(const emulation::Product& product, int i) {
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize % 4;
    const int row = 16 * warp + lane / 4 + i % 2 * 8, along = 16 * product.step + lane % 4 * 2 + i / 2 * 8;
    const uint16_t* from = product.left_rows + swizzled(row, along);
    return uint32_t(shown(from)) | uint32_t(shown(from + 1)) << 16;
}

inline void end_products(int groups) {
    constexpr int kMostOfLane = emulation::kMostColumns / kWarpSize;
    const int lane = int(threadIdx.x) % kWarpSize;
    while (const emulation::Product* due = emulation::product_due(groups)) {
        uint16_t right[kMostOfLane][16];
        for (int i = 0, column = lane; column < due->columns; i++, column += kWarpSize)
            for (int k = 0; k < 16; k++) right[i][k] = shown(right_of(*due, column, k));
        uint32_t left[4];
        for (int i = 0; i < 4; i++) left[i] = due->left ? due->left[i] : pair_of_left(*due, i);
        emulation::multiply_due(left, right);
    }
}
#endif

// Of all groups but the last ``Groups``.
template <int Groups, int Tiles>
__device__ __forceinline__ void wait_for_products(float (&sums)[Tiles][4]) {
#if !defined(__CUDACC__)
    (void)sums;
    end_products(Groups);
#else
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
#endif
    pin(sums);
#endif
}

// left: what products had as their left side, which is not written over before.
template <int Groups, int Tiles, int Steps>
__device__ __forceinline__ void wait_for_products(float (&sums)[Tiles][4], const uint32_t (&left)[Steps][4]) {
    wait_for_products<Groups>(sums);
#if !defined(__CUDACC__)
    (void)left;
#else
    UNROLL for (int step = 0; step < Steps; step++)
        UNROLL for (int i = 0; i < 4; i++) asm volatile("" ::"r"(left[step][i]) : "memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Where the right side begins, with swizzling of 128 bytes; addresses and offsets in units of 16 bytes.
__device__ __forceinline__ uint64_t descriptor_of(const void* first, int leading, int stride) {
    const uint64_t address = (__cvta_generic_to_shared(first) & 0x3ffff) >> 4;
    return address | uint64_t(leading) << 16 | uint64_t(stride) << 32 | uint64_t(1) << 62;
}

constexpr int kEightRows = 8 * kGroupRow * 2 >> 4;

#define SUMS_OF(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_OF_4(n) SUMS_OF(n), SUMS_OF(n + 1), SUMS_OF(n + 2), SUMS_OF(n + 3)
#define PRODUCT_OF_32(type, across)                                                                                       \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %21, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " {"                                      \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                \
                 "}, {%16, %17, %18, %19}, %20, adds, 1, 1, " across ";\n}"                                            \
                 : SUMS_OF_4(0)                                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int(adds))                         \
                 : "memory")
#define PRODUCT_64(type, operands, adds_at, ...)                                                                       \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_at ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                                      \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "     \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                               \
                 "}, " operands ";\n}"                                                                                 \
                 : SUMS_OF_4(0), SUMS_OF_4(4)                                                                          \
                 : __VA_ARGS__, "l"(descriptor), "r"(int(adds))                                                        \
                 : "memory")
#define PRODUCT_128(type, operands, adds_at, ...)                                                                      \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_at ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                                     \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "     \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "     \
                 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "     \
                 "%59, %60, %61, %62, %63"                                                                             \
                 "}, " operands ";\n}"                                                                                 \
                 : SUMS_OF_4(0), SUMS_OF_4(4), SUMS_OF_4(8), SUMS_OF_4(12)                                             \
                 : __VA_ARGS__, "l"(descriptor), "r"(int(adds))                                                        \
                 : "memory")
// The left side in registers.
#define PRODUCT_OF_64(type, across)                                                                                    \
    PRODUCT_64(type, "{%32, %33, %34, %35}, %36, adds, 1, 1, " across, "%37", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))
#define PRODUCT_OF_128(type, across)                                                                                   \
    PRODUCT_128(type, "{%64, %65, %66, %67}, %68, adds, 1, 1, " across, "%69", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))
#endif

// c = (adds ? c : 0) + a · the step-th 16 elements of ``Tiles`` · 8 rows
template <typename T, int Tiles>
__device__ __forceinline__ void multiply_group(float (&c)[Tiles][4], const uint32_t (&a)[4], const T* rows, int step,
                                               bool adds) {
    static_assert(Tiles == 4 || Tiles == 8 || Tiles == 16, "a wgmma of 32, 64 or 128 columns");
#if !defined(__CUDACC__)
    emulation::multiply_later(
        {&c[0][0], a, nullptr, reinterpret_cast<const uint16_t*>(rows), Tiles * 8, step, 0, adds,
         std::is_same_v<T, bf16>});
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const uint64_t descriptor = descriptor_of(rows, 1, kEightRows) + 2 * uint64_t(step);
    if constexpr (Tiles == 4) {
        if constexpr (std::is_same_v<T, bf16>)
            PRODUCT_OF_32("bf16", "0");
        else
            PRODUCT_OF_32("f16", "0");
    } else if constexpr (Tiles == 8) {
        if constexpr (std::is_same_v<T, bf16>)
            PRODUCT_OF_64("bf16", "0");
        else
            PRODUCT_OF_64("f16", "0");
    } else {
        if constexpr (std::is_same_v<T, bf16>)
            PRODUCT_OF_128("bf16", "0");
        else
            PRODUCT_OF_128("f16", "0");
    }
#endif
}

// The same with the left side in shared memory too: the warpgroup's 64 rows, at a multiple of 1024 bytes.
template <typename T, int Tiles>
__device__ __forceinline__ void multiply_group_shared(float (&c)[Tiles][4], const T* left_rows, const T* rows, int step,
                                                      bool adds) {
    static_assert(Tiles == 8 || Tiles == 16, "a wgmma of 64 or 128 columns");
#if !defined(__CUDACC__)
    emulation::multiply_later({&c[0][0], nullptr, reinterpret_cast<const uint16_t*>(left_rows),
                               reinterpret_cast<const uint16_t*>(rows), Tiles * 8, step, 0, adds,
                               std::is_same_v<T, bf16>});
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const uint64_t left = descriptor_of(left_rows, 1, kEightRows) + 2 * uint64_t(step);
    const uint64_t descriptor = descriptor_of(rows, 1, kEightRows) + 2 * uint64_t(step);
    if constexpr (Tiles == 8) {
        if constexpr (std::is_same_v<T, bf16>)
            PRODUCT_64("bf16", "%32, %33, adds, 1, 1, 0, 0", "%34", "l"(left));
        else
            PRODUCT_64("f16", "%32, %33, adds, 1, 1, 0, 0", "%34", "l"(left));
    } else {
        if constexpr (std::is_same_v<T, bf16>)
            PRODUCT_128("bf16", "%64, %65, adds, 1, 1, 0, 0", "%66", "l"(left));
        else
            PRODUCT_128("f16", "%64, %65, adds, 1, 1, 0, 0", "%66", "l"(left));
    }
#endif
}

// c += a · the step-th 16 rows: of ``Tiles`` · 8 columns, each 64 of which are a panel of rows, ``panel`` elements apart
template <typename T, int Tiles>
__device__ __forceinline__ void multiply_group_rows(float (&c)[Tiles][4], const uint32_t (&a)[4], const T* rows, int step,
                                                    int panel) {
    static_assert(Tiles == 8 || Tiles == 16, "a wgmma of 64 or 128 columns");
#if !defined(__CUDACC__)
    emulation::multiply_later(
        {&c[0][0], a, nullptr, reinterpret_cast<const uint16_t*>(rows), Tiles * 8, step, panel, true,
         std::is_same_v<T, bf16>});
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr bool adds = true;
    const uint64_t descriptor = descriptor_of(rows, panel * 2 >> 4, kEightRows) + 2 * kEightRows * uint64_t(step);
    if constexpr (Tiles == 8) {
        if constexpr (std::is_same_v<T, bf16>)
            PRODUCT_OF_64("bf16", "1");
        else
            PRODUCT_OF_64("f16", "1");
    } else {
        if constexpr (std::is_same_v<T, bf16>)
            PRODUCT_OF_128("bf16", "1");
        else
            PRODUCT_OF_128("f16", "1");
    }
#endif
}
