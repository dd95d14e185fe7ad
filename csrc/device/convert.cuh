// Two floats to one word of a 16-bit type and back, and the bit patterns that tell finite numbers from the rest.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fsa {

template <typename T>
struct HalfType;

template <>
struct HalfType<__half> {
    static constexpr uint32_t kInfinityBits = 0x7c00u;
    static __device__ __forceinline__ uint32_t pack(float x, float y) {
        const __half2 h = __floats2half2_rn(x, y);
        return reinterpret_cast<const uint32_t&>(h);
    }
    static __device__ __forceinline__ float2 unpack(uint32_t word) {
        return __half22float2(reinterpret_cast<const __half2&>(word));
    }
};

template <>
struct HalfType<__nv_bfloat16> {
    static constexpr uint32_t kInfinityBits = 0x7f80u;
    static __device__ __forceinline__ uint32_t pack(float x, float y) {
        const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
        return reinterpret_cast<const uint32_t&>(h);
    }
    static __device__ __forceinline__ float2 unpack(uint32_t word) {
        return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
    }
};

// The larger magnitude of each half-word, as bit patterns: these order like the numbers, inf and NaN last.
__device__ __forceinline__ uint32_t max_magnitude_bits(uint32_t packed_max, uint32_t word) {
    return __vmaxu2(packed_max, word & 0x7fff7fffu);
}

template <typename T>
__device__ __forceinline__ bool has_nonfinite(uint32_t packed_max) {
    return (packed_max & 0xffffu) >= HalfType<T>::kInfinityBits || (packed_max >> 16) >= HalfType<T>::kInfinityBits;
}

// Inf and NaN replaced by zero.
template <typename T>
__device__ __forceinline__ uint32_t zero_nonfinite(uint32_t word) {
    const uint32_t magnitude = word & 0x7fff7fffu;
    if ((magnitude & 0xffffu) >= HalfType<T>::kInfinityBits) word &= 0xffff0000u;
    if ((magnitude >> 16) >= HalfType<T>::kInfinityBits) word &= 0x0000ffffu;
    return word;
}

}  // namespace fsa
