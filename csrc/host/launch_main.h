// How the persistent main kernels are launched.
#pragma once

#include <algorithm>

#include "launch.h"

namespace fsa {

// As many CTAs as the GPU holds, or as there are sub-blocks to work on.
template <typename Traits, typename Params>
void launch_main(const char* name, void (*kernel)(Params), const Params& params, cudaStream_t stream) {
    const int ctas = std::min(params.plan.max_items * params.geometry.subs, sm_count() * Traits::kMinCtas);
    launch(name, kernel, {dim3(ctas), Traits::kThreads, Traits::kSharedBytes}, params, stream);
}

}  // namespace fsa
