// Division of 31-bit numbers by a divisor known only at launch: one multiply-high, one add, one shift.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FSA_HOST_DEVICE inline
#endif

namespace fsa {

// Round-up method (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994, figure 4.1):
// with l = ceil(log2(divisor)) and m = floor(2^32 * (2^l - divisor) / divisor) + 1, n / divisor = (mulhi(m, n) + n)
// >> l. The sum stays below 2^32 because n < 2^31.
struct FastDivider {
    uint32_t divisor;
    uint32_t multiplier;
    uint32_t shift;

    FastDivider() = default;

    // 1 <= divisor < 2^31
    FSA_HOST_DEVICE explicit FastDivider(uint32_t d) : divisor(d), shift(0) {
        while ((uint64_t{1} << shift) < d) ++shift;
        multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
    }

    // 0 <= n < 2^31
    FSA_HOST_DEVICE uint32_t quotient(uint32_t n) const {
#ifdef __CUDA_ARCH__
        return (__umulhi(multiplier, n) + n) >> shift;
#else
        return (static_cast<uint32_t>((static_cast<uint64_t>(multiplier) * n) >> 32) + n) >> shift;
#endif
    }
};

}  // namespace fsa
