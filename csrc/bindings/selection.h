// The ops of the selection's stages. Their schemas stand in fsa/module/cuda_selection.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fsa {

using torch::stable::Tensor;

void block_scores(
    Tensor q, Tensor compressed_k, Tensor lse, Tensor cu_seqlens, Tensor compressed_cu_seqlens, int64_t query_begin,
    int64_t query_end, int64_t kernel_size, int64_t kernel_stride, int64_t block_size, double softmax_scale,
    Tensor scores);

void select_topk(
    Tensor scores, Tensor cu_seqlens, int64_t query_begin, int64_t query_end, int64_t block_size, int64_t init_blocks,
    int64_t local_blocks, Tensor topk_idx);

}  // namespace fsa
