// Row-wise softmax in the log2 domain, and the one place that knows what an empty row means.
#pragma once

#include <cmath>

#include "device/ptx.cuh"

namespace fsa {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What to subtract before exp2: the maximum, or 0 where it is -inf (no visible key), since (-inf) - (-inf) is NaN.
__device__ __forceinline__ float finite_shift(float maximum) {
    return maximum == -INFINITY ? 0.f : maximum;
}

// 1 / sum, or 0 for an empty row. NaN stays NaN; a row with keys has sum >= 1 (2^-19 in the shared stage), far from where the
// approximation flushes.
__device__ __forceinline__ float reciprocal_or_zero(float sum) {
    return sum == 0.f ? 0.f : reciprocal_approx(sum);
}

// log2(sum of exp2) from shift and sum of exp2(x - shift); -inf for an empty row.
__device__ __forceinline__ float log2_sum_exp(float shift, float sum) {
    return sum == 0.f ? -INFINITY : shift + __log2f(sum);
}

// 2^exponent, exact; exponents from -126 to 127.
__device__ __forceinline__ float power_of_two(int exponent) {
    return __int_as_float((127 + exponent) << 23);
}

// Over the four lanes that share a row of an accumulator fragment.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace fsa
