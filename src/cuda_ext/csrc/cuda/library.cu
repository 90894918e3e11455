// The exported functions that are no operator: what this library is, what went wrong, many calls at once.
#include <cstdio>
#include <cstdlib>

#include "launch.h"

namespace {
thread_local char error_text[1200];
}

void set_error(const char* kernel, const char* what) {
    std::snprintf(error_text, sizeof error_text, "%s: %s", kernel, what);
}

#if defined(__CUDACC__)
static Chip ask_driver(int device) {
    int major = 0, minor = 0, processors = 0, shared_bytes = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return {10 * major + minor, processors, size_t(shared_bytes)};
}
#else
constexpr Chip kEmulated[] = {{80, 108, 163 << 10},
                              {86, 84, kLeastSharedBytes},
                              {89, 142, kLeastSharedBytes},
                              {90, 132, 227 << 10},
                              {100, 148, 227 << 10}};
#endif

const Chip& chip() {
#if defined(__CUDACC__)
    thread_local int known = -1;
    thread_local Chip chip;
    int device = 0;
    cudaGetDevice(&device);
    if (device != known) chip = ask_driver(known = device);
    return chip;
#else
    thread_local Chip emulated;
    emulated = kEmulated[0];
    if (const char* wanted = std::getenv("SHOAL_EMULATED_CHIP")) {
        for (const Chip& chip : kEmulated)
            if (std::atoi(wanted) == chip.capability) emulated = chip;
        if (const char* processors = std::strchr(wanted, ':')) emulated.processors = std::atoi(processors + 1);
    }
    return emulated;
#endif
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
