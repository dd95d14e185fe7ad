// Stage reduce of the forward: merges the partial outputs of a query's slots by an online softmax over their
// log-sum-exps.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// T: __half or __nv_bfloat16.
template <typename T>
void launch_forward_reduce(const ForwardReduceParams& params, cudaStream_t stream);

}  // namespace fsa
