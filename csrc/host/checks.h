// Preconditions of the stage ops. Users never meet them: fsa/checks.py states the errors of the public op; these
// catch a caller of the private ops whose buffers do not fit together, before anything is launched.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

#include "host/context.h"

namespace fsa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_buffer(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(on_device(t), name, " must be a CUDA tensor");
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
    STD_TORCH_CHECK(
        t.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions, got ", t.dim());
    int64_t i = 0;
    for (const int64_t size : shape) {
        STD_TORCH_CHECK(t.size(i) == size, name, " must have size ", size, " in dimension ", i, ", got ", t.size(i));
        ++i;
    }
}

// [tokens, heads, head_dim] with unit stride along head_dim and rows that start at 16-byte boundaries.
inline void check_rows(const Tensor& t, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(on_device(t), name, " must be a CUDA tensor");
    STD_TORCH_CHECK(t.dim() == 3, name, " must have 3 dimensions, got ", t.dim());
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
    STD_TORCH_CHECK(t.stride(2) == 1, name, " must be contiguous along head_dim, got stride ", t.stride(2));
    const int64_t per_16_bytes = 16 / static_cast<int64_t>(t.element_size());
    STD_TORCH_CHECK(
        t.stride(0) % per_16_bytes == 0 && t.stride(1) % per_16_bytes == 0 &&
            reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
        name, " must have rows that start at 16-byte boundaries");
}

}  // namespace fsa
