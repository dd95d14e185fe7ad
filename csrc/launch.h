// What every launcher needs around a kernel: checks of CUDA's answers, shared memory beyond 48 KB, the number of SMs.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fsa {

// torch's own check macro needs a symbol that CPU builds of torch lack, and this library must load there.
inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // or the next, healthy launch would report it again
        throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(status));
    }
}

inline int sm_count() {
    int device = 0, count = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

struct LaunchShape {
    dim3 ctas;
    int threads;
    int shared_bytes;  // dynamic
};

template <typename Params>
void launch(
    const char* name, void (*kernel)(Params), const LaunchShape& shape, const Params& params, cudaStream_t stream) {
    if (shape.shared_bytes > 48 * 1024) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes), name);
    }
    kernel<<<shape.ctas, shape.threads, shape.shared_bytes, stream>>>(params);
    check_cuda(cudaGetLastError(), name);
}

}  // namespace fsa
