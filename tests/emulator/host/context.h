// csrc/host/context.h for the emulator: tensors of the CPU, no stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "emulator.h"

namespace fsa {

struct DeviceGuard {
    explicit DeviceGuard(int) {}
};

inline bool on_device(const torch::stable::Tensor& t) {
    return t.is_cpu();
}

inline cudaStream_t current_stream(const torch::stable::Tensor&) {
    return nullptr;
}

}  // namespace fsa
