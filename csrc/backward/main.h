// Stage main of the backward: five matrix products a tile, dK and dV kept on chip for a block, dQ left as partials.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// T: __half or __nv_bfloat16; kHeadDim >= head_dim, kTileK = block_size / subs. Instantiated by main_inst.cu.in.
template <typename T, int kHeadDim, int kTileK>
void launch_backward_main(const BackwardMainParams& params, cudaStream_t stream);

// The same on sm_90a: kHeadDim <= 128, kTileK = 64. Instantiated by main_sm90_inst.cu.in.
template <typename T, int kHeadDim, int kTileK>
void launch_backward_main_sm90(const BackwardMainParams& params, cudaStream_t stream);

}  // namespace fsa
