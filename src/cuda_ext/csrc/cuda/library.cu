// The exported functions that are no operator: what this library is, what went wrong, many calls at once.
#include <cstdio>

#include "launch.h"

namespace {
thread_local char error_text[1200];
}

void set_error(const char* kernel, const char* what) {
    std::snprintf(error_text, sizeof error_text, "%s: %s", kernel, what);
}

// One operator's function and its struct; shoal_run runs many.
struct Call {
    int (*function)(const void* args);
    const void* args;
};

extern "C" {

// The CRC-32 of shoal_cuda.h as this was built: a caller with other structs must not go on.
EXPORT uint32_t shoal_interface() { return SHOAL_INTERFACE; }

// What the kernels were compiled for: "sm_80 sm_90a …", or "emulation".
EXPORT const char* shoal_targets() { return SHOAL_TARGETS; }

// In words, after an operator returned kLaunchFailed on this thread.
EXPORT const char* shoal_error() { return error_text; }

// Runs the calls in order. Returns 0, or where one fails its status + 256 · its index: those after it did not run.
EXPORT int shoal_run(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (const int status = calls[i].function(calls[i].args)) return status + int(i) * 256;
    return kOk;
}

#if !defined(__CUDACC__)
// As shoal_run, all blocks of all calls taking turns: for kernels that wait for each other.
EXPORT int shoal_run_together(const Call* calls, int64_t count) {
    emulation::begin_together();
    const int status = shoal_run(calls, count);
    if (emulation::end_together()) return status;
    set_error("together", emulation::error());
    return kLaunchFailed;
}
#endif

}  // extern "C"
