// What the tensors and sizes of a stage op become: the structs of params.h, checked against each other.
#pragma once

#include "host/checks.h"
#include "params.h"

namespace fsa {

// The chunk and its problem, as every stage op gets them.
struct ChunkArguments {
    const Tensor& topk_idx;
    const Tensor& cu_seqlens_q;
    const Tensor& cu_seqlens_k;
    int64_t head_begin, head_end, query_begin, query_end, block_size;
    bool causal;
    int64_t total_k;
};

// subs, group_size and head_dim are those of a partial buffer [num_heads, num_queries, topk, subs, group_size,
// head_dim].
Geometry make_geometry(const ChunkArguments& a, int64_t subs, int64_t group_size, int64_t head_dim);

// Makes of several chunks the first one.
ChunkGrid cut_chunks(ChunkArguments& a, int64_t chunk_heads, int64_t chunk_queries);

// Geometry from a partial buffer, which is checked against it.
Geometry geometry_of_partial(const ChunkArguments& a, const Tensor& partial, const char* name, ScalarType dtype);

// At most: an id may select nothing.
int64_t num_edges_bound(const Geometry& g);

// Of a plan over so many cells; how long its list is.
int64_t max_work_items(const Geometry& g, int64_t cells, int64_t edges_per_item);

// csr_offsets: [cells + 1], of one chunk
PlanView plan_view(
    const Geometry& g, const Tensor& csr_offsets, const Tensor& csr_edges, const Tensor& work_items,
    const Tensor& next_item, int64_t edges_per_item);

// dk, dv: of the input dtype, or float32 where they accumulate
KeyValueGradients key_value_gradients(
    const Geometry& g, const Tensor& dk, const Tensor& dv, const Tensor& dkv_pieces, ScalarType input_dtype,
    int64_t edges_per_item, bool accumulate);

// What forward_reduce takes, and forward_shared with more.
ForwardReduceParams reduce_params(
    const Geometry& g, const Tensor& topk_idx, const Tensor& o_partial, const Tensor& lse_partial,
    const Tensor& value_exponent, const Tensor& out, const Tensor& lse, ScalarType dtype);

// Of several chunks as large as this one, their heads one after the other.
SharedBlocks shared_blocks_of(
    const Geometry& g, int64_t num_chunks, const Tensor& blocks, const Tensor& counts, const Tensor& scattered_counts,
    const Tensor& next);

}  // namespace fsa
