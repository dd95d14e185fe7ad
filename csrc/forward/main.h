// Stage main of the forward: softmax(Q K^T) V of every (query, slot) on its own, a block of keys at a time.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// T: __half or __nv_bfloat16; kHeadDim >= head_dim, kTileK = block_size / subs. Instantiated by main_inst.cu.in.
template <typename T, int kHeadDim, int kTileK>
void launch_forward_main(const ForwardMainParams& params, cudaStream_t stream);

// The same for GPUs of compute capability 9.0. Instantiated by main_sm90_inst.cu.in.
template <typename T, int kHeadDim, int kTileK>
void launch_forward_main_sm90(const ForwardMainParams& params, cudaStream_t stream);

}  // namespace fsa
