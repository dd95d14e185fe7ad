// Stage split of the forward: which of a query's slots go query-outer, because neighbouring queries share their block,
// and which are left to main.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

void launch_forward_split(const ForwardSplitParams& params, cudaStream_t stream);

}  // namespace fsa
