// The tile products of the tensor cores, the copies that feed them, and clusters: what threads do together. Each wrapper is the
// instruction under nvcc and its emulation under g++; nothing else here knows of either.
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

// 16 bytes of global memory to shared memory, or zeros; there once wait_for_copies and a barrier say so.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from, bool is_wanted) {
#if defined(__CUDACC__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(is_wanted ? 16 : 0)
                 : "memory");
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
