// Stage reduce of the backward: dQ from its partials over slots, dK and dV from the pieces of cut cells.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// T: __half or __nv_bfloat16.
template <typename T>
void launch_backward_reduce(const BackwardReduceParams& params, cudaStream_t stream);

}  // namespace fsa
