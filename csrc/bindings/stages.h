// The stage ops: tensors to params, checks, dispatch, launch. Their schemas stand in fsa/stages_cuda.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fsa {

using torch::stable::Tensor;

void forward_split(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t chunk_heads, int64_t chunk_queries, int64_t block_size, bool causal,
    int64_t total_k, int64_t run_queries, int64_t min_queries, Tensor scattered_idx, Tensor shared_blocks,
    Tensor shared_counts, Tensor scattered_counts, Tensor shared_next);

void plan(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t chunk_heads, int64_t chunk_queries, int64_t block_size, bool causal,
    int64_t total_k, int64_t edges_per_item, int64_t min_rest, int64_t num_ranges, int64_t parts, Tensor csr_offsets,
    Tensor csr_edges, Tensor work_items, Tensor next_item, Tensor scratch);

void forward_main(
    Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin,
    int64_t head_end, int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, double softmax_scale,
    Tensor csr_offsets, Tensor csr_edges, Tensor work_items, Tensor next_item, int64_t edges_per_item, Tensor o_partial,
    Tensor lse_partial, Tensor value_exponent, int64_t arch);

void forward_shared(
    Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin,
    int64_t head_end, int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, double softmax_scale,
    Tensor shared_blocks, Tensor shared_counts, Tensor scattered_counts, Tensor shared_next, Tensor o_partial,
    Tensor lse_partial, Tensor value_exponent, Tensor out, Tensor lse);

void forward_reduce(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, int64_t total_k, Tensor o_partial,
    Tensor lse_partial, Tensor value_exponent, Tensor out, Tensor lse);

void backward_preprocess(Tensor out, Tensor dout, std::optional<Tensor> dlse, Tensor delta);

void backward_main(
    Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin,
    int64_t head_end, int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, double softmax_scale,
    Tensor csr_offsets, Tensor csr_edges, Tensor work_items, Tensor next_item, int64_t edges_per_item, Tensor dout,
    Tensor lse, Tensor delta, Tensor dq_partial, Tensor dk, Tensor dv, Tensor dkv_pieces, bool accumulate,
    int64_t arch);

void backward_reduce(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, int64_t total_k, Tensor csr_offsets,
    int64_t edges_per_item, Tensor dq_partial, Tensor dkv_pieces, Tensor dq, Tensor dk, Tensor dv, bool accumulate);

}  // namespace fsa
