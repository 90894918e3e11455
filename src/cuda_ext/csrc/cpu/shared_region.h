// The memory that the ranks of one host share: how far each has come, and two sets of slots, one chunk of floats a
// rank.
//
// In a round each rank puts its numbers into its slot, meets the others, and reads their slots. Rounds take turns
// with the two sets: a rank may write its next numbers while others still read the last ones, and no rank can be two
// rounds ahead, since it would have to meet the others first.
#pragma once

#include <cstddef>

#include "shoal_cpu.h"

struct Region;

class Round {
   public:
    Round(void* region, const RegionMember& me);

    float* slot(int64_t rank) const { return slots_ + rank * me_.chunk; }

    // Waits for all ranks; what they wrote before can be read afterwards. False where one of them is gone, or has
    // not come for half a minute.
    bool meet() const;

   private:
    bool wait_for(int64_t rank, uint32_t meeting) const;

    Region& region_;
    const RegionMember& me_;
    float* slots_;
};
