// Stage plan: inverts topk_idx into CSR by (KV head, KV block) and cuts the lists into work items.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace fsa {

// Bytes of PlanParams::scan_scratch for this many counts. Touches no device memory.
size_t plan_scan_scratch_bytes(int num_counts);

void launch_plan(const PlanParams& params, cudaStream_t stream);

}  // namespace fsa
