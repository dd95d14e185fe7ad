// The device that torch works on: where its tensors lie, its current stream, its device guard.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

// CPU builds of torch lack this symbol, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fsa {

using torch::stable::accelerator::DeviceGuard;

inline bool on_device(const torch::stable::Tensor& t) {
    return t.is_cuda();
}

inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA support");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
    return static_cast<cudaStream_t>(stream);
}

}  // namespace fsa
