// How a kernel is started: on the stream under nvcc, by the emulation's runtime under g++.
#pragma once

#include <cstring>
#include <tuple>
#include <utility>

#include "device.h"
#include "shoal_cuda.h"
#if !defined(__CUDACC__)
#include "emulation/runtime.h"
#endif

// The last launch that failed on this thread, in words.
void set_error(const char* kernel, const char* what);

// Bytes that a kernel may have without being asked for.
constexpr size_t kOrdinarySharedBytes = 48 << 10;

template <typename... Params>
int launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           const Params&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kOk;
#if defined(__CUDACC__)
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kOrdinarySharedBytes)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error == cudaSuccess) {
        kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
        error = cudaGetLastError();
    }
#else
    struct Context {
        void (*kernel)(Params...);
        std::tuple<Params...> args;
    };
    const Context context{kernel, {args...}};
    const emulation::Body body = [](const void* bytes) {
        const auto& mine = *static_cast<const Context*>(bytes);
        std::apply(mine.kernel, mine.args);
    };
    const cudaError_t error =
        emulation::launch(stream, name, grid, dim3(threads), shared_bytes, body, &context, sizeof context);
#endif
    if (error == cudaSuccess) return kOk;
    set_error(name, cudaGetErrorString(error));
    return kLaunchFailed;
}

// The block's memory, as many bytes as the launch gave it.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
#else
    return static_cast<unsigned char*>(emulation::dynamic_shared());
#endif
}
