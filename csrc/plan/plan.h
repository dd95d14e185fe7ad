// Stage plan: inverts topk_idx into CSR by (KV head, query range, KV block) and cuts the lists into work items.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

constexpr int kPlanGroup = 32;  // neighbouring blocks whose edges are summed up once, for all cells behind them

void launch_plan(const PlanParams& params, cudaStream_t stream);

}  // namespace fsa
