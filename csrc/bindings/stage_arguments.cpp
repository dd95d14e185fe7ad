#include "bindings/stage_arguments.h"

#include <algorithm>

namespace fsa {

Geometry make_geometry(const ChunkArguments& a, int64_t subs, int64_t group_size, int64_t head_dim) {
    STD_TORCH_CHECK(a.topk_idx.dim() == 3, "topk_idx must have 3 dimensions");
    const int64_t num_kv_heads = a.topk_idx.size(0), total_q = a.topk_idx.size(1), topk = a.topk_idx.size(2);
    const int64_t batch = a.cu_seqlens_q.numel() - 1;
    check_buffer(a.topk_idx, "topk_idx", ScalarType::Int, {num_kv_heads, total_q, topk});
    check_buffer(a.cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, {batch + 1});
    check_buffer(a.cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, {batch + 1});
    STD_TORCH_CHECK(0 <= a.head_begin && a.head_begin < a.head_end && a.head_end <= num_kv_heads, "heads out of range");
    STD_TORCH_CHECK(
        0 <= a.query_begin && a.query_begin < a.query_end && a.query_end <= total_q, "queries out of range");
    STD_TORCH_CHECK(batch >= 1 && topk >= 1 && group_size >= 1 && subs >= 1, "empty problem");
    STD_TORCH_CHECK(a.block_size > 0 && a.block_size % subs == 0, "subs must divide block_size");
    STD_TORCH_CHECK(head_dim > 0 && head_dim % 8 == 0, "head_dim must be a multiple of 8");
    const int64_t num_blocks = a.total_k / a.block_size + batch;
    const int64_t edges = (a.head_end - a.head_begin) * (a.query_end - a.query_begin) * topk;
    STD_TORCH_CHECK(
        total_q <= INT32_MAX && a.total_k <= INT32_MAX && edges * subs * group_size <= INT32_MAX &&
            2 * edges <= INT32_MAX && (a.head_end - a.head_begin) * num_blocks <= INT32_MAX,
        "the chunk is too large for 32-bit row numbers");

    Geometry g = {};
    g.sequences = {
        static_cast<const int32_t*>(a.cu_seqlens_q.const_data_ptr()),
        static_cast<const int32_t*>(a.cu_seqlens_k.const_data_ptr()), static_cast<int>(batch),
        static_cast<int>(total_q), static_cast<int>(a.total_k)};
    g.head_begin = static_cast<int>(a.head_begin);
    g.num_heads = static_cast<int>(a.head_end - a.head_begin);
    g.query_begin = static_cast<int>(a.query_begin);
    g.num_queries = static_cast<int>(a.query_end - a.query_begin);
    g.group_size = static_cast<int>(group_size);
    g.head_dim = static_cast<int>(head_dim);
    g.topk = static_cast<int>(topk);
    g.block_size = static_cast<int>(a.block_size);
    g.subs = static_cast<int>(subs);
    g.num_blocks = static_cast<int>(num_blocks);
    g.causal = a.causal;
    g.by_num_queries = FastDivider(g.num_queries);
    g.by_group_size = FastDivider(g.group_size);
    g.by_topk = FastDivider(g.topk);
    g.by_subs = FastDivider(g.subs);
    return g;
}

ChunkGrid cut_chunks(ChunkArguments& a, int64_t chunk_heads, int64_t chunk_queries) {
    STD_TORCH_CHECK(a.topk_idx.dim() == 3, "topk_idx must have 3 dimensions");
    STD_TORCH_CHECK(a.head_end <= a.topk_idx.size(0) && a.query_end <= a.topk_idx.size(1), "chunks out of range");
    STD_TORCH_CHECK(chunk_heads >= 1 && chunk_queries >= 1, "empty chunks");
    const auto count = [](int64_t begin, int64_t end, int64_t each) { return (end - begin + each - 1) / each; };
    const int64_t query_chunks = count(a.query_begin, a.query_end, chunk_queries);
    const int64_t num_chunks = query_chunks * count(a.head_begin, a.head_end, chunk_heads);
    STD_TORCH_CHECK(num_chunks <= 65535, "too many chunks at a time");
    const ChunkGrid grid = {
        static_cast<int>(a.head_end), static_cast<int>(a.query_end), static_cast<int>(query_chunks),
        static_cast<int>(num_chunks)};
    a.head_end = std::min(a.head_begin + chunk_heads, a.head_end);
    a.query_end = std::min(a.query_begin + chunk_queries, a.query_end);
    return grid;
}

Geometry geometry_of_partial(const ChunkArguments& a, const Tensor& partial, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(partial.dim() == 6, name, " must have 6 dimensions");
    const int64_t subs = partial.size(3), group_size = partial.size(4), head_dim = partial.size(5);
    const Geometry g = make_geometry(a, subs, group_size, head_dim);
    check_buffer(partial, name, dtype, {g.num_heads, g.num_queries, g.topk, subs, group_size, head_dim});
    return g;
}

int64_t num_edges_bound(const Geometry& g) {
    return static_cast<int64_t>(g.num_heads) * g.num_queries * g.topk;
}

int64_t max_work_items(const Geometry& g, int64_t cells, int64_t edges_per_item) {
    // Half: a cell's edges, up to 2^30, and an item's are added up.
    STD_TORCH_CHECK(
        edges_per_item >= 1 && edges_per_item * g.group_size <= INT32_MAX / 2, "edges_per_item out of range");
    const int64_t max_items = num_edges_bound(g) / edges_per_item + cells;
    STD_TORCH_CHECK(max_items * g.subs <= INT32_MAX, "too many work items");
    return max_items;
}

PlanView plan_view(
    const Geometry& g, const Tensor& csr_offsets, const Tensor& csr_edges, const Tensor& work_items,
    const Tensor& next_item, int64_t edges_per_item) {
    const int64_t cells = csr_offsets.numel() - 1, max_items = max_work_items(g, cells, edges_per_item);
    STD_TORCH_CHECK(
        cells > 0 && cells % (static_cast<int64_t>(g.num_heads) * g.num_blocks) == 0,
        "csr_offsets must have an entry a cell, and one more");
    check_buffer(csr_offsets, "csr_offsets", ScalarType::Int, {cells + 1});
    check_buffer(csr_edges, "csr_edges", ScalarType::Int, {num_edges_bound(g)});
    check_buffer(work_items, "work_items", ScalarType::Int, {max_items, 4});
    check_buffer(next_item, "next_item", ScalarType::Int, {1});
    return {
        static_cast<const int32_t*>(csr_offsets.const_data_ptr()),
        static_cast<const int32_t*>(csr_edges.const_data_ptr()),
        static_cast<const int4*>(work_items.const_data_ptr()),
        static_cast<int32_t*>(next_item.mutable_data_ptr()),
        static_cast<int>(max_items),
        static_cast<int>(edges_per_item)};
}

KeyValueGradients key_value_gradients(
    const Geometry& g, const Tensor& dk, const Tensor& dv, const Tensor& dkv_pieces, ScalarType input_dtype,
    int64_t edges_per_item, bool accumulate) {
    const ScalarType dtype = accumulate ? ScalarType::Float : input_dtype;
    for (const Tensor* t : {&dk, &dv}) {
        STD_TORCH_CHECK(
            on_device(*t) && t->scalar_type() == dtype && t->dim() == 3,
            "dk and dv must be 3-d CUDA tensors of the right dtype");
        STD_TORCH_CHECK(
            t->size(0) == g.sequences.total_k && t->size(1) == g.num_heads && t->size(2) == g.head_dim,
            "dk and dv must be [total_k, num_heads of the chunk, head_dim]");
        STD_TORCH_CHECK(
            t->stride(2) == 1 && t->stride(0) % 8 == 0 && t->stride(1) % 8 == 0 && t->stride(0) == dk.stride(0) &&
                t->stride(1) == dk.stride(1),
            "dk and dv must have contiguous rows and the same strides");
    }
    const int64_t tile_k = g.block_size / g.subs, max_pieces = 2 * num_edges_bound(g) / edges_per_item + 1;
    check_buffer(dkv_pieces, "dkv_pieces", ScalarType::Float, {max_pieces, g.subs, 2, tile_k, g.head_dim});
    return {
        dk.mutable_data_ptr(),
        dv.mutable_data_ptr(),
        dk.stride(0),
        dk.stride(1),
        static_cast<float*>(dkv_pieces.mutable_data_ptr()),
        static_cast<int>(tile_k),
        accumulate};
}

ForwardReduceParams reduce_params(
    const Geometry& g, const Tensor& topk_idx, const Tensor& o_partial, const Tensor& lse_partial,
    const Tensor& value_exponent, const Tensor& out, const Tensor& lse, ScalarType dtype) {
    const int64_t num_kv_heads = topk_idx.size(0), total_q = topk_idx.size(1), num_heads = num_kv_heads * g.group_size;
    check_buffer(
        lse_partial, "lse_partial", ScalarType::Float, {g.num_heads, g.num_queries, g.topk, g.subs, g.group_size});
    check_buffer(value_exponent, "value_exponent", ScalarType::Int, {g.num_heads, g.num_blocks, g.subs});
    check_buffer(out, "out", dtype, {total_q, num_heads, g.head_dim});
    check_buffer(lse, "lse", ScalarType::Float, {num_heads, total_q});
    return {
        g,
        static_cast<const int32_t*>(topk_idx.const_data_ptr()),
        static_cast<const __half*>(o_partial.const_data_ptr()),
        static_cast<const float*>(lse_partial.const_data_ptr()),
        static_cast<const int32_t*>(value_exponent.const_data_ptr()),
        out.mutable_data_ptr(),
        static_cast<float*>(lse.mutable_data_ptr()),
        static_cast<int>(num_kv_heads)};
}

SharedBlocks shared_blocks_of(
    const Geometry& g, int64_t num_chunks, const Tensor& blocks, const Tensor& counts, const Tensor& scattered_counts,
    const Tensor& next) {
    const int64_t num_tiles = (g.num_queries - 1) / kQueryTile + 1;
    const int64_t heads = num_chunks * g.num_heads;
    STD_TORCH_CHECK(blocks.dim() == 4, "shared_blocks must have 4 dimensions");
    check_buffer(blocks, "shared_blocks", ScalarType::Int, {heads, num_tiles, blocks.size(2), 4});
    check_buffer(counts, "shared_counts", ScalarType::Int, {heads, num_tiles});
    check_buffer(scattered_counts, "scattered_counts", ScalarType::Int, {heads, g.num_queries});
    check_buffer(next, "shared_next", ScalarType::Int, {num_chunks});
    return {
        static_cast<int4*>(blocks.mutable_data_ptr()),
        static_cast<int32_t*>(counts.mutable_data_ptr()),
        static_cast<int32_t*>(scattered_counts.mutable_data_ptr()),
        static_cast<int32_t*>(next.mutable_data_ptr()),
        static_cast<int>(num_tiles),
        static_cast<int>(blocks.size(2))};
}

}  // namespace fsa
