// How the ranks of one host meet in memory that all of them reach. A block meets only its namesakes of the other ranks, so
// an operator must give the same work to the same block index on every rank. Calls are numbered, and odd and even ones use
// slots of their own: who begins call n + 2 knows that all others have begun n + 1, and so have read what n left. In a
// call the ranks may meet once or twice; all of them as often.
#pragma once

#include "launch.h"

constexpr int kMostBlocks = 64;

// The header of a region.
struct Signs {
    uint32_t seen[kMostBlocks][kMostRanks];  // each rank's last sign: twice the call, and one more at its second meeting
    uint32_t calls[kMostBlocks];             // that this rank has finished
};
static_assert(sizeof(Signs) <= kRegionHeader);

struct Regions {
    unsigned char* of[kMostRanks];
    __device__ __forceinline__ Signs& signs(int rank) const { return *reinterpret_cast<Signs*>(of[rank]); }
};

__device__ __forceinline__ void tell(uint32_t* at, uint32_t sign) {
#if defined(__CUDACC__)
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(sign) : "memory");
#else
    __atomic_store_n(at, sign, __ATOMIC_RELEASE);
#endif
}

__device__ __forceinline__ uint32_t look(const uint32_t* at) {
#if defined(__CUDACC__)
    uint32_t sign;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(sign) : "l"(at) : "memory");
    return sign;
#else
    emulation::spin();
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#endif
}

__device__ __forceinline__ bool is_stopped(const int32_t* stop) {
    return stop && *static_cast<const volatile int32_t*>(stop) != 0;
}

// A rank's part of this call lies behind its region's address plus this.
__device__ __forceinline__ int64_t slot_of(uint32_t call, int64_t slot_bytes) {
    return kRegionHeader + call % 2 * slot_bytes;
}

enum Meeting : uint32_t { kFirst = 0, kSecond = 1 };

// Every thread calls; what they have written to the slot the others then see, and the other way round.
__device__ __forceinline__ void meet(const Regions& regions, int rank, int ranks, uint32_t call, Meeting meeting,
                                     const int32_t* stop, int32_t* fault) {
    Signs& mine = regions.signs(rank);
    const uint32_t sign = 2 * call + meeting;
    const int block = int(blockIdx.x);
    __syncthreads();
    if (int(threadIdx.x) < ranks) {
        const int peer = int(threadIdx.x);
        tell(&regions.signs(peer).seen[block][rank], sign);
        while (int32_t(look(&mine.seen[block][peer]) - sign) < 0)
            if (is_stopped(stop)) {
                atomicCAS(fault, kOk, kPeerLost);
                break;
            }
    }
    __syncthreads();
}

inline Regions regions_of(void* const* addresses, int64_t ranks) {
    Regions regions = {};
    for (int64_t rank = 0; rank < ranks; rank++) regions.of[rank] = static_cast<unsigned char*>(addresses[rank]);
    return regions;
}
