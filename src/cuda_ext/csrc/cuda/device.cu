// What a rank wants of a device besides operators: memory, copies, waiting, graphs, memory that processes share. Each
// returns kOk, kNoMemory, or kLaunchFailed with the driver's words in shoal_error.
#include <cstdio>

#include "launch.h"

namespace {

int told(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return kOk;
    cudaGetLastError();  // else the next launch would find it
    set_error(what, cudaGetErrorString(error));
    return error == cudaErrorMemoryAllocation ? kNoMemory : kLaunchFailed;
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" {

// The index-th chip's name and compute capability (10 · major + minor); 0 where there is none.
EXPORT int shoal_chip(int index, char* name, int name_bytes) {
    cudaDeviceProp chip;
    if (told("cudaGetDeviceProperties", cudaGetDeviceProperties(&chip, index))) return 0;
    std::snprintf(name, size_t(name_bytes), "%s", chip.name);
    return 10 * chip.major + chip.minor;
}

// What this thread's other calls are about.
EXPORT int shoal_use_device(int index) { return told("cudaSetDevice", cudaSetDevice(index)); }

// Bytes of the device.
EXPORT int shoal_memory(int64_t* free, int64_t* total) {
    size_t free_bytes = 0, total_bytes = 0;
    const int status = told("cudaMemGetInfo", cudaMemGetInfo(&free_bytes, &total_bytes));
    *free = int64_t(free_bytes);
    *total = int64_t(total_bytes);
    return status;
}

// Zeros on the device.
EXPORT int shoal_allocate(void** at, int64_t bytes) {
    *at = nullptr;
    if (const int status = told("cudaMalloc", cudaMalloc(at, size_t(bytes)))) return status;
    if (const int status = told("cudaMemset", cudaMemset(*at, 0, size_t(bytes)))) return status;
    return told("cudaMemset", cudaStreamSynchronize(nullptr));
}

EXPORT int shoal_free(void* at) { return told("cudaFree", cudaFree(at)); }

// Memory of the host that the device can reach too.
EXPORT int shoal_allocate_host(void** at, int64_t bytes) {
    *at = nullptr;
    return told("cudaHostAlloc", cudaHostAlloc(at, size_t(bytes), cudaHostAllocDefault));
}

EXPORT int shoal_free_host(void* at) { return told("cudaFreeHost", cudaFreeHost(at)); }

EXPORT int shoal_stream(void** stream) {
    return told("cudaStreamCreate",
                cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking));
}

// Between host and device, either way. Host memory is to be of shoal_allocate_host, else the call waits.
EXPORT int shoal_copy(void* to, const void* from, int64_t bytes, void* stream) {
    return told("cudaMemcpyAsync",
                cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream_of(stream)));
}

// The first ``bytes`` of each of ``rows`` rows that begin ``pitch`` bytes apart, here and there.
EXPORT int shoal_copy_rows(void* to, const void* from, int64_t pitch, int64_t bytes, int64_t rows, void* stream) {
    return told("cudaMemcpy2DAsync", cudaMemcpy2DAsync(to, size_t(pitch), from, size_t(pitch), size_t(bytes),
                                                       size_t(rows), cudaMemcpyDefault, stream_of(stream)));
}

// Waits for all that the stream has been given.
EXPORT int shoal_synchronise(void* stream) {
    return told("cudaStreamSynchronize", cudaStreamSynchronize(stream_of(stream)));
}

EXPORT int shoal_event(void** event) {
    return told("cudaEventCreate",
                cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming));
}

EXPORT int shoal_record(void* event, void* stream) {
    return told("cudaEventRecord", cudaEventRecord(static_cast<cudaEvent_t>(event), stream_of(stream)));
}

// Waits for what the stream had been given when the event was recorded.
EXPORT int shoal_wait(void* event) {
    return told("cudaEventSynchronize", cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
}

// done: 0 or 1.
EXPORT int shoal_ask(void* event, int* done) {
    const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
    *done = error == cudaSuccess;
    return error == cudaErrorNotReady ? kOk : told("cudaEventQuery", error);
}

// From now on what the stream is given is not run but put into a graph.
EXPORT int shoal_begin_capture(void* stream) {
    return told("cudaStreamBeginCapture",
                cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal));
}

EXPORT int shoal_end_capture(void* stream, void** graph) {
    *graph = nullptr;
    cudaGraph_t captured = nullptr;
    if (const int status = told("cudaStreamEndCapture", cudaStreamEndCapture(stream_of(stream), &captured)))
        return status;
    const cudaError_t error = cudaGraphInstantiate(reinterpret_cast<cudaGraphExec_t*>(graph), captured, 0);
    cudaGraphDestroy(captured);
    return told("cudaGraphInstantiate", error);
}

EXPORT int shoal_launch_graph(void* graph, void* stream) {
    return told("cudaGraphLaunch", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream_of(stream)));
}

EXPORT int shoal_drop_graph(void* graph) {
    return told("cudaGraphExecDestroy", cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)));
}

// handle: 64 bytes by which another process opens what shoal_allocate gave.
EXPORT int shoal_share(void* memory, void* handle) {
    return told("cudaIpcGetMemHandle", cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t*>(handle), memory));
}

EXPORT int shoal_open_shared(const void* handle, void** at) {
    cudaIpcMemHandle_t copy;
    std::memcpy(&copy, handle, sizeof copy);
    return told("cudaIpcOpenMemHandle", cudaIpcOpenMemHandle(at, copy, cudaIpcMemLazyEnablePeerAccess));
}

EXPORT int shoal_close_shared(void* at) { return told("cudaIpcCloseMemHandle", cudaIpcCloseMemHandle(at)); }

}  // extern "C"
