// Stage preprocess of the backward: delta = rowsum(dout * out) - dlse.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// T: __half or __nv_bfloat16.
template <typename T>
void launch_backward_preprocess(const BackwardPreprocessParams& params, cudaStream_t stream);

}  // namespace fsa
