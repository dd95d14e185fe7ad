// What every launcher needs around a kernel: checks of CUDA's answers, shared memory beyond 48 KB, the number of SMs; and
// kernels that overlap at their ends (programmatic dependent launch, sm_90).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device/ptx.cuh"

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

// Every kernel calls this before it touches global memory: it is launched while the one before is ending, and waits here. None
// lets the next one come earlier (griddepcontrol.launch_dependents): CTAs that wait are in the way (docs/performance.md).
__device__ __forceinline__ void await_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    griddepcontrol_wait();
#endif
}

template <typename Params>
void launch(
    const char* name, void (*kernel)(Params), const LaunchShape& shape, const Params& params, cudaStream_t stream) {
    // Machine code for sm_90 waits; what the driver made of PTX for sm_80 does not, on whatever GPU it runs.
    cudaFuncAttributes code;
    check_cuda(cudaFuncGetAttributes(&code, kernel), name);
    if (shape.shared_bytes > 48 * 1024) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes), name);
    }
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.ctas;
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace fsa
