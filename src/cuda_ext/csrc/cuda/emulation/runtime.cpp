// The runtime of runtime.h. One thread at a time calls it.
#include "runtime.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

using Work = std::function<cudaError_t()>;

struct CUgraph_st {
    std::vector<Work> work;
};
struct CUgraphExec_st {
    std::vector<Work> work;
};
struct CUstream_st {
    std::deque<Work> waiting;
    uint64_t asked = 0, done = 0;
    CUgraph_st* captured = nullptr;
};
struct CUevent_st {
    cudaStream_t stream = nullptr;
    uint64_t at = 0;
};

namespace {

struct Piece {
    size_t bytes;
    int file;
};

cudaError_t failed = cudaSuccess;  // what no call of a chip recovers from
std::map<void*, Piece> pieces;
size_t taken = 0;
std::map<std::string, long> launched;
std::vector<cudaStream_t> streams;

long environment(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::atol(text) : otherwise;
}

size_t memory_bytes() { return size_t(environment("SHOAL_EMULATED_MEMORY", 256L << 20)); }
int devices() { return int(environment("SHOAL_EMULATED_DEVICES", 1)); }

bool is_planted(const char* kernel) {
    const char* text = std::getenv("SHOAL_EMULATED_FAULT");
    const char* colon = text ? std::strchr(text, ':') : nullptr;
    return colon && std::string(text, colon) == kernel && ++launched[kernel] == std::atol(colon + 1);
}

cudaError_t add(cudaStream_t stream, Work work) {
    if (failed) return failed;
    if (!stream) return work();
    if (stream->captured) {
        stream->captured->work.push_back(std::move(work));
        return cudaSuccess;
    }
    stream->waiting.push_back(std::move(work));
    stream->asked++;
    return cudaSuccess;
}

void do_one(cudaStream_t stream) {
    const Work work = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    stream->done++;
    if (!failed) failed = work();
}

void* map_shared(int file, size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return at == MAP_FAILED ? nullptr : at;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNotReady: return "device not ready";
        case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
        case cudaErrorLaunchFailure: return emulation::error();
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        default: return "invalid argument";
    }
}

cudaError_t cudaGetLastError() { return failed; }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = devices();
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* chip, int device) {
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    std::snprintf(chip->name, sizeof chip->name, "emulated chip");
    chip->major = 8;
    chip->minor = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device < devices() ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = memory_bytes();
    *free = *total - (taken < *total ? taken : *total);
    return failed;
}

cudaError_t cudaMalloc(void** at, size_t bytes) {
    if (failed) return failed;
    if (taken + bytes > memory_bytes()) return cudaErrorMemoryAllocation;
    const int file = memfd_create("device", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, off_t(bytes)) || !(*at = map_shared(file, bytes))) return cudaErrorMemoryAllocation;
    pieces[*at] = {bytes, file};
    taken += bytes;
    return cudaSuccess;
}

// Waits for all that is under way, as on a chip.
cudaError_t cudaFree(void* at) {
    for (const cudaStream_t stream : streams) cudaStreamSynchronize(stream);
    const auto found = pieces.find(at);
    if (found == pieces.end()) return at ? cudaErrorInvalidValue : cudaSuccess;
    taken -= found->second.bytes;
    munmap(at, found->second.bytes);
    close(found->second.file);
    pieces.erase(found);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned) {
    *at = std::malloc(bytes);
    return *at ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* at) {
    std::free(at);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* at, int value, size_t bytes) {
    std::memset(at, value, bytes);
    return failed;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return add(stream, [=] {
        std::memcpy(to, from, bytes);
        return cudaSuccess;
    });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                              cudaMemcpyKind, cudaStream_t stream) {
    return add(stream, [=] {
        for (size_t row = 0; row < rows; row++)
            std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                        width);
        return cudaSuccess;
    });
}

// A handle is the path of the memory's file in the process that has it, and its size.
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* at) {
    const auto found = pieces.find(at);
    if (found == pieces.end()) return cudaErrorInvalidValue;
    std::snprintf(handle->reserved, sizeof handle->reserved, "%zu /proc/%d/fd/%d", found->second.bytes, int(getpid()),
                  found->second.file);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** at, cudaIpcMemHandle_t handle, unsigned) {
    char path[64] = "";
    size_t bytes = 0;
    if (std::sscanf(handle.reserved, "%zu %63s", &bytes, path) != 2) return cudaErrorInvalidValue;
    const int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || !(*at = map_shared(file, bytes))) return cudaErrorInvalidValue;
    pieces[*at] = {0, file};
    emulation::wait_for_other_processes();
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* at) { return cudaFree(at); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new CUstream_st;
    streams.push_back(*stream);
    return failed;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    while (stream && !stream->waiting.empty()) do_one(stream);
    return failed;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st;
    return failed;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->stream = stream;
    event->at = stream->asked;
    return failed;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    while (event->stream && event->stream->done < event->at) do_one(event->stream);
    return failed;
}

// Each question is answered after one piece of work.
cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event->stream && event->stream->done < event->at) do_one(event->stream);
    if (failed) return failed;
    return event->stream && event->stream->done < event->at ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (stream->captured) return cudaErrorStreamCaptureUnsupported;
    stream->captured = new CUgraph_st;
    return failed;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = stream->captured;
    stream->captured = nullptr;
    return failed;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
    *ready = new CUgraphExec_st{graph->work};
    return failed;
}

// Work on a stream that is thrown away before it is done is the caller's mistake, as on a chip.
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream) {
    for (const Work& work : ready->work)
        if (const cudaError_t error = add(stream, work)) return error;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) {
    delete ready;
    return cudaSuccess;
}

cudaError_t emulation::launch(void* stream, const char* name, dim3 grid, unsigned cluster, dim3 block,
                              size_t shared_bytes, Body body, const void* context, size_t bytes) {
    const auto* first = static_cast<const unsigned char*>(context);
    const std::vector<unsigned char> kept(first, first + bytes);
    const bool is_on_stream = stream != nullptr;
    return add(static_cast<cudaStream_t>(stream), [=] {
        if (is_on_stream && is_planted(name)) return cudaErrorIllegalAddress;
        return run(name, grid, cluster, block, shared_bytes, body, kept.data(), bytes) ? cudaSuccess
                                                                                        : cudaErrorLaunchFailure;
    });
}
