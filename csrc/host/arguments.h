// One argument of an op as the kernels take it.
#pragma once

#include <algorithm>
#include <cfloat>

#include "host/checks.h"
#include "params.h"

namespace fsa {

inline RowTensor row_tensor(
    const Tensor& t, const char* name, ScalarType dtype, int64_t tokens, int64_t heads, int64_t head_dim) {
    check_rows(t, name, dtype);
    STD_TORCH_CHECK(t.size(0) == tokens && t.size(1) == heads && t.size(2) == head_dim, name, " has the wrong shape");
    return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

inline bool is_bf16(const Tensor& t) {
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "expected fp16 or bf16");
    return dtype == ScalarType::BFloat16;
}

// Scores are scaled inside exp2. Positive, so that the largest score is the largest logit; not so small that it would
// flush to zero, and -inf times it be NaN.
inline float scale_log2(double softmax_scale) {
    STD_TORCH_CHECK(softmax_scale > 0, "softmax_scale must be positive");
    return std::max(static_cast<float>(softmax_scale * 1.4426950408889634), FLT_MIN);
}

}  // namespace fsa
