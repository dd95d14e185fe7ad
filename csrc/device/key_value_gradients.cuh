// Writing dK and dV of a sub-block, from main (registers) and from reduce (summed pieces).
#pragma once

#include "device/convert.cuh"
#include "params.h"

namespace fsa {

// Elements x, x + 1 of a row of dk or dv.
template <typename T>
__device__ __forceinline__ void store_gradient_pair(
    void* gradient, int64_t element, bool accumulate, float x, float y) {
    if (accumulate) {
        float2* target = reinterpret_cast<float2*>(static_cast<float*>(gradient) + element);
        const float2 before = *target;
        *target = make_float2(before.x + x, before.y + y);
    } else {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(gradient) + element) = HalfType<T>::pack(x, y);
    }
}

// Element 0 of row `key` (0 .. tile_k - 1) of a piece's dk (0) or dv (1).
__device__ __forceinline__ float* piece_row(
    const KeyValueGradients& g, int subs, int head_dim, int64_t piece, int sub, int which, int key) {
    return g.dkv_pieces + (((piece * subs + sub) * 2 + which) * g.tile_k + key) * head_dim;
}

// The first piece of a cell that is cut; as many rows as it has pieces are its own (a cell of n > edges_per_item
// edges has ceil(n / edges_per_item) <= floor(2 n / edges_per_item) of them).
__device__ __forceinline__ int first_piece(int csr_offset, int edges_per_item) {
    return static_cast<int>(2 * static_cast<int64_t>(csr_offset) / edges_per_item);
}

}  // namespace fsa
