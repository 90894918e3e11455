// Compiled for AMX where the compiler knows it; else there are no tiles.
#include "tiles.h"

#if defined(__AMX_BF16__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

bool tiles_are_usable() {
    constexpr unsigned kVectorBf16 = 1u << 5, kShiftedWords = 1u << 6, kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr unsigned kAll = kBf16 | kTile | kInt8;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAll) != kAll || !(ecx & kShiftedWords))
        return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & kVectorBf16)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool tiles_are_usable() { return false; }

#endif
