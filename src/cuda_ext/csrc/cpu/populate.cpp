// Memory that the system gives before it is first written.
#include <sys/mman.h>

#include <atomic>

#include "parallel.h"
#include "shoal_cpu.h"

namespace {

constexpr int64_t kPiece = 2 << 20;  // a huge page
constexpr int kPopulateWrite = 23;   // MADV_POPULATE_WRITE, which older headers don't have

}  // namespace

extern "C" {

// begin: of a page. kNoMemory where the system does not do it: Linux before 5.14, or memory is short.
EXPORT int shoal_populate(char* begin, int64_t bytes) {
    std::atomic<bool> failed{false};
    parallel_items((bytes + kPiece - 1) / kPiece, true, [&](int64_t piece, int) {
        const int64_t first = piece * kPiece, size = bytes - first < kPiece ? bytes - first : kPiece;
        if (madvise(begin + first, size_t(size), kPopulateWrite)) failed = true;
    });
    return failed ? kNoMemory : kOk;
}

}  // extern "C"
