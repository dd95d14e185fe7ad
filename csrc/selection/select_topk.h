// Stage select_topk of the selection: the blocks that a query attends to, from their scores.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

void launch_select_topk(const SelectTopkParams& params, cudaStream_t stream);

}  // namespace fsa
