// The copy engine of sm_90 (TMA), one PTX instruction a function. It brings boxes of a tensor, which a tensor map describes
// (host/tensor_map.h), into shared memory; a barrier there counts the bytes.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fsa {

using TensorMap = CUtensorMap;

// Arrives at an mbarrier (ptx.cuh), whose phase does not end before so many bytes have come, too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Copies the box whose first element is (x, y, z), or (x, y, z, w), the innermost dimension first. The map is a kernel
// parameter.
__device__ __forceinline__ void tma_load_3d(
    uint32_t shared, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(shared),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void tma_load_4d(
    uint32_t shared, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

}  // namespace fsa
