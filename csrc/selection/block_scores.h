// Stage block_scores of the selection: attention probabilities of compressed keys, summed over the heads of a group and the
// windows of a block.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// For GPUs of compute capability 9.0; has_block_scores (dispatch.h) says for which windows. T: __half or __nv_bfloat16;
// kHeadDim >= head_dim. Instantiated by block_scores_sm90_inst.cu.in.
template <typename T, int kHeadDim>
void launch_block_scores_sm90(const BlockScoresParams& params, cudaStream_t stream);

}  // namespace fsa
