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

// What a kernel's shape depends on.
struct Chip {
    int capability;       // 10 · major + minor
    int processors;       // streaming multiprocessors
    size_t shared_bytes;  // that a block may have
};

// What a block may have on every chip from sm_80 on: on those of compute capability 8.6 and 8.9.
constexpr size_t kLeastSharedBytes = 99 << 10;

// The current device, or the one that is emulated: ``SHOAL_EMULATED_CHIP`` is its compute capability, 80 where unset, and
// behind a colon how many processors it has, to see what large matrices do with small ones.
const Chip& chip();

// Whether the kernel was compiled with clusters: not where the driver compiles what was meant for older chips.
template <auto Kernel>
bool has_clusters() {
#if defined(__CUDACC__)
    static const bool is_new = [] {
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, Kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    }();
    if (!is_new) return false;
#endif
    return chip().capability >= 90;
}

// Whether the chip has wgmma and this library was compiled with it.
inline bool has_wgmma() {
#if defined(__CUDACC__)
    static const bool is_compiled = std::strstr(SHOAL_TARGETS, "sm_90a") != nullptr;
    if (!is_compiled) return false;
#endif
    return chip().capability == 90;
}

// Bytes that a kernel may have without being asked for.
constexpr size_t kOrdinarySharedBytes = 48 << 10;

#if defined(__CUDACC__)
// Whether kernels wait themselves for the one ahead (begin_kernel), so that they may come before it has ended: those that
// were compiled for sm_90 and later, which all of this library's are that run on a chip, or none.
inline bool waits_for_others(const void* kernel) {
    static const bool is_new = [kernel] {
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    }();
    return is_new && chip().capability >= 90;
}
#endif

// cluster: blocks side by side along z that form one.
template <typename... Params>
int launch_clusters(const char* name, void (*kernel)(Params...), dim3 grid, unsigned cluster, int threads,
                    size_t shared_bytes, void* stream, const Params&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kOk;
#if defined(__CUDACC__)
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kOrdinarySharedBytes)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error == cudaSuccess) {
        cudaLaunchAttribute attributes[2] = {};
        unsigned count = 0;
        if (waits_for_others(reinterpret_cast<const void*>(kernel))) {
            attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[count++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (cluster > 1) {
            attributes[count].id = cudaLaunchAttributeClusterDimension;
            attributes[count++].val.clusterDim = {1, 1, cluster};
        }
        cudaLaunchConfig_t config = {};
        config.gridDim = grid;
        config.blockDim = dim3(unsigned(threads));
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = attributes;
        config.numAttrs = count;
        error = cudaLaunchKernelEx(&config, kernel, args...);
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
        shared_bytes > chip().shared_bytes
            ? cudaErrorInvalidValue
            : emulation::launch(stream, name, grid, cluster, dim3(threads), shared_bytes, body, &context, sizeof context);
#endif
    if (error == cudaSuccess) return kOk;
    set_error(name, cudaGetErrorString(error));
    return kLaunchFailed;
}

template <typename... Params>
int launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           const Params&... args) {
    return launch_clusters(name, kernel, grid, 1, threads, shared_bytes, stream, args...);
}

// The block's memory, as many bytes as the launch gave it, at a multiple of 1024.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
#else
    return static_cast<unsigned char*>(emulation::dynamic_shared());
#endif
}
