// Registration only.
#include <torch/csrc/stable/library.h>

#include "bindings/selection.h"
#include "bindings/stages.h"

STABLE_TORCH_LIBRARY_IMPL(fsa, CUDA, m) {
    m.impl("_forward_split", TORCH_BOX(&fsa::forward_split));
    m.impl("_plan", TORCH_BOX(&fsa::plan));
    m.impl("_forward_main", TORCH_BOX(&fsa::forward_main));
    m.impl("_forward_shared", TORCH_BOX(&fsa::forward_shared));
    m.impl("_forward_reduce", TORCH_BOX(&fsa::forward_reduce));
    m.impl("_backward_preprocess", TORCH_BOX(&fsa::backward_preprocess));
    m.impl("_backward_main", TORCH_BOX(&fsa::backward_main));
    m.impl("_backward_reduce", TORCH_BOX(&fsa::backward_reduce));
    m.impl("_block_scores", TORCH_BOX(&fsa::block_scores));
    m.impl("_select_topk", TORCH_BOX(&fsa::select_topk));
}
