// Calls cuBLAS, whose few functions are looked up when the first product wants them: nothing is linked, and where it is
// missing other kernels do. Its declarations are those of cublas_api.h, which is the same in versions 12 and 13.
#include "library_product.h"

#include <mutex>

#if defined(__CUDACC__)
#include <dlfcn.h>

#include <cstdio>
#else
#include <cstdlib>
#endif

namespace {

constexpr int kThreads = 256;

// What the product is added to.
template <typename T>
__global__ void __launch_bounds__(kThreads) fill_with_bias_kernel(T* out, const float* bias, int64_t outputs, int64_t stride) {
    begin_kernel();
    const int64_t output = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (output < outputs) out[blockIdx.y * stride + output] = from_float<T>(bias[output]);
}

template <typename T>
int fill_with_bias(const LibraryProduct& a) {
    const dim3 grid(unsigned((a.outputs + kThreads - 1) / kThreads), unsigned(a.rows));
    return launch("linear", fill_with_bias_kernel<T>, grid, kThreads, 0, a.stream, static_cast<T*>(a.out), a.bias,
                  a.outputs, a.out_stride);
}

int fill_with_bias(const LibraryProduct& a) {
    switch (a.out_dtype) {
        case kBFloat16: return fill_with_bias<bf16>(a);
        case kFloat16: return fill_with_bias<fp16>(a);
        default: return fill_with_bias<float>(a);
    }
}

#if defined(__CUDACC__)

struct Functions {
    int (*create)(void** handle);
    int (*set_stream)(void* handle, cudaStream_t stream);
    int (*set_workspace)(void* handle, void* workspace, size_t bytes);
    int (*set_math_mode)(void* handle, int mode);
    int (*multiply)(void* handle, int turns_a, int turns_b, int m, int n, int k, const void* alpha, const void* a,
                    int a_type, int a_stride, const void* b, int b_type, int b_stride, const void* beta, void* c,
                    int c_type, int c_stride, int compute_type, int algorithm);
};

constexpr int kAsIs = 0, kTurned = 1;               // cublasOperation_t
constexpr int kWholeSums = 16;                      // CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
constexpr int kSumsOfFloat32 = 68, kDefault = -1;   // CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
constexpr size_t kWorkspaceBytes = size_t(32) << 20;  // as cuBLAS itself takes on a chip with wgmma

int type_of(int64_t dtype) { return dtype == kBFloat16 ? 14 : dtype == kFloat16 ? 2 : 0; }  // cudaDataType_t

// Null where there is no cuBLAS, or one without them. What torch has loaded already is taken first.
const Functions* functions() {
    static const Functions* const found = []() -> const Functions* {
        static Functions all;
        for (const int how : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY})
            for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
                void* const library = dlopen(name, how);
                if (!library) continue;
                const auto find = [library](auto& function, const char* symbol) {
                    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
                    return function != nullptr;
                };
                if (find(all.create, "cublasCreate_v2") && find(all.set_stream, "cublasSetStream_v2") &&
                    find(all.set_workspace, "cublasSetWorkspace_v2") &&
                    find(all.set_math_mode, "cublasSetMathMode") && find(all.multiply, "cublasGemmEx"))
                    return &all;
            }
        return nullptr;
    }();
    return found;
}
#endif

// A device's.
struct Resources {
    std::once_flag is_started, has_scratch;
    void* scratch;
#if defined(__CUDACC__)
    void* handle;
    void* workspace;
    void* stream;  // the one that the handle is set to
#endif
};

Resources& resources() {
    constexpr int kMostDevices = 64;
    static Resources all[kMostDevices];
    int device = 0;
#if defined(__CUDACC__)
    cudaGetDevice(&device);
#endif
    return all[device % kMostDevices];
}

void* allocated(size_t bytes) {
#if defined(__CUDACC__)
    void* at = nullptr;
    if (cudaMalloc(&at, bytes) == cudaSuccess) return at;
    cudaGetLastError();  // else the next launch would find it
    return nullptr;
#else
    return std::malloc(bytes);
#endif
}

#if !defined(__CUDACC__)
// Stands in for the library: a thread an output.
template <typename T, typename Out>
void product_kernel(LibraryProduct a) {
    const int64_t output = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
    if (output >= a.outputs) return;
    const T* x = static_cast<const T*>(a.x) + row * a.row_stride;
    const T* weight = static_cast<const T*>(a.weight) + output * a.weight_stride;
    Out& out = static_cast<Out*>(a.out)[row * a.out_stride + output];
    double sum = a.bias ? double(to_float(out)) : 0.0;
    for (int64_t i = 0; i < a.inputs; i++) sum += double(to_float(x[i])) * double(to_float(weight[i]));
    out = from_float<Out>(float(sum));
}

template <typename T>
int multiply(const LibraryProduct& a) {
    const dim3 grid(unsigned((a.outputs + kThreads - 1) / kThreads), unsigned(a.rows));
    const auto kernel = a.out_dtype == kFloat32 ? product_kernel<T, float> : product_kernel<T, T>;
    return launch("cuBLAS", kernel, grid, kThreads, 0, a.stream, a);
}
#endif

}  // namespace

bool has_product_library() {
#if defined(__CUDACC__)
    const Functions* const library = functions();
    if (!library) return false;
    Resources& mine = resources();
    std::call_once(mine.is_started, [&] {
        if (library->create(&mine.handle)) return;
        library->set_math_mode(mine.handle, kWholeSums);
        mine.workspace = allocated(kWorkspaceBytes);
        mine.stream = &mine;  // none that there is
    });
    return mine.handle && mine.workspace;
#else
    return !std::getenv("SHOAL_EMULATED_NO_CUBLAS");
#endif
}

// Whether the current device's products of many rows go through cuBLAS.
extern "C" EXPORT int shoal_has_product_library() { return has_product_library(); }

void* product_scratch() {
    Resources& mine = resources();
    std::call_once(mine.has_scratch, [&] { mine.scratch = allocated(kScratchBytes); });
    return mine.scratch;
}

int multiply_by_library(const LibraryProduct& a) {
    if (a.bias)
        if (const int status = fill_with_bias(a)) return status;
#if defined(__CUDACC__)
    Resources& mine = resources();
    const Functions& library = *functions();
    const float one = 1.0f, added = a.bias ? 1.0f : 0.0f;
    const int type = type_of(a.dtype);
    int status = 0;
    if (a.stream != mine.stream) {
        status = library.set_stream(mine.handle, static_cast<cudaStream_t>(a.stream));
        if (!status) status = library.set_workspace(mine.handle, mine.workspace, kWorkspaceBytes);
        mine.stream = a.stream;
    }
    // To cuBLAS a matrix lies column after column: it makes outᵀ = weight · xᵀ.
    if (!status)
        status = library.multiply(mine.handle, kTurned, kAsIs, int(a.outputs), int(a.rows), int(a.inputs), &one,
                                  a.weight, type, int(a.weight_stride), a.x, type, int(a.row_stride), &added, a.out,
                                  type_of(a.out_dtype), int(a.out_stride), kSumsOfFloat32, kDefault);
    if (!status) return kOk;
    char said[32];
    std::snprintf(said, sizeof said, "status %d", status);
    set_error("cuBLAS", said);
    return kLaunchFailed;
#else
    return a.dtype == kBFloat16 ? multiply<bf16>(a) : multiply<fp16>(a);
#endif
}
