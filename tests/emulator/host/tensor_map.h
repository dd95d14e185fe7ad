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
        {head_dim, num_heads, num_tokens, 1},
        {2, tensor.head_stride * 2, tensor.token_stride * 2, 0},
        {Tile::kPanelColumns, 1, Tile::kNumRows, 1}};
}

template <typename Tile>
TensorMap make_partial_map(const __half* o_partial, const Geometry& g, int heads, int queries) {
    const int64_t partials = static_cast<int64_t>(g.topk) * g.subs, row_bytes = g.head_dim * 2;
    return {
        reinterpret_cast<const unsigned char*>(o_partial),
        {g.head_dim, g.group_size, partials, static_cast<int64_t>(g.num_heads) * g.num_queries},
        {2, row_bytes, row_bytes * g.group_size, row_bytes * g.group_size * partials},
        {Tile::kPanelColumns, heads, 1, queries}};
}

}  // namespace fsa
