// The one function of CUB that csrc/ uses, for the emulator.
#pragma once

#include <numeric>

#include "emulator.h"

namespace cub {

struct DeviceScan {
    static cudaError_t ExclusiveSum(
        void* scratch, size_t& bytes, const int32_t* from, int32_t* to, int count, cudaStream_t = nullptr) {
        if (scratch == nullptr) {
            bytes = 1;
        } else {
            std::exclusive_scan(from, from + count, to, 0);
        }
        return cudaSuccess;
    }
};

}  // namespace cub
