// Waiting for something that is about to happen, without sleeping.
#pragma once

#include <time.h>

#include <cstdint>

inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

// Whether ``happened`` became true within the time.
template <typename Condition>
bool look_out_for(int64_t time_ns, Condition happened) {
    const int64_t until = now_ns() + time_ns;
    do {
        for (int i = 0; i < 32; i++) {
            if (happened()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
    } while (now_ns() < until);
    return false;
}
