// Stage shared of the forward, the last one where blocks are shared: softmax(Q K^T) V over those of a query tile, and over the
// partials that main left for the others.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// For GPUs of compute capability 9.0; block_size is a multiple of 64. T: __half or __nv_bfloat16; kHeadDim >= head_dim.
// Instantiated by shared_sm90_inst.cu.in.
template <typename T, int kHeadDim>
void launch_forward_shared_sm90(const ForwardSharedParams& params, cudaStream_t stream);

}  // namespace fsa
