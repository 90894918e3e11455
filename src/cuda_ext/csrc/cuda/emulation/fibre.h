// Stacks that take turns in one thread of the system. The sanitizers are told of each change.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// SHOAL_THREAD_SANITIZER: the kernels, not this file, are compiled with -fsanitize=thread.
#if defined(SHOAL_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fibre, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulation {

struct Stack {
    void* pointer = nullptr;  // where the stopped fibre goes on
    const void* bottom = nullptr;
    size_t bytes = 0;
    void* fake = nullptr;
    void* announced = nullptr;
};

// Everything before this in any fibre that released comes before everything after it in one that acquires.
inline void release(void* what) {
#if defined(SHOAL_THREAD_SANITIZER)
    __tsan_release(what);
#endif
    (void)what;
}

inline void acquire(void* what) {
#if defined(SHOAL_THREAD_SANITIZER)
    __tsan_acquire(what);
#endif
    (void)what;
}

// Memory for a fibre, once.
void make_stack(Stack& stack);

// Makes a fibre begin with ``entry`` at the next change to it.
void rewind(Stack& stack, void (*entry)());

// What a fibre does first: ``from`` is the stack that was left for it.
void arrived(Stack& mine);

// Stops ``from``, goes on with ``to``. leaves: for good.
void change(Stack& from, Stack& to, bool leaves);

}  // namespace emulation
