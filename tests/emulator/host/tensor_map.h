// csrc/host/tensor_map.h for the emulator.
#pragma once

#include "device/tma.cuh"
#include "params.h"

namespace fsa {

template <typename T, typename Tile>
TensorMap make_tensor_map(const RowTensor& tensor, int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
    for (const int64_t stride : {tensor.head_stride, tensor.token_stride}) {
        if (stride <= 0 || stride * 2 % 16 != 0)
            emulator::fail("a tensor map with a stride of 0, or not of whole 16 bytes");
    }
    if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) emulator::fail("a tensor map of a misaligned tensor");
    return {
        static_cast<const unsigned char*>(tensor.data),
        {head_dim, num_heads, num_tokens},
        {2, tensor.head_stride * 2, tensor.token_stride * 2},
        Tile::kPanelColumns,
        Tile::kNumRows};
}

}  // namespace fsa
