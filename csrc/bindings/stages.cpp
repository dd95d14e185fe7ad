#include "bindings/stages.h"

#include "backward/main.h"
#include "backward/preprocess.h"
#include "backward/reduce.h"
#include "bindings/stage_arguments.h"
#include "dispatch.h"
#include "forward/main.h"
#include "forward/reduce.h"
#include "forward/shared.h"
#include "forward/split.h"
#include "host/arguments.h"
#include "host/checks.h"
#include "host/context.h"
#include "params.h"
#include "plan/plan.h"

namespace fsa {

void forward_split(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t chunk_heads, int64_t chunk_queries, int64_t block_size, bool causal,
    int64_t total_k, int64_t run_queries, int64_t min_queries, Tensor scattered_idx, Tensor shared_blocks,
    Tensor shared_counts, Tensor scattered_counts, Tensor shared_next) {
    ChunkArguments a = {topk_idx,    cu_seqlens_q, cu_seqlens_k, head_begin, head_end,
                        query_begin, query_end,    block_size,   causal,     total_k};
    ForwardSplitParams p = {};
    p.grid = cut_chunks(a, chunk_heads, chunk_queries);
    p.geometry = make_geometry(a, 1, 1, 8);
    check_buffer(
        scattered_idx, "scattered_idx", ScalarType::Int, {topk_idx.size(0), topk_idx.size(1), topk_idx.size(2)});
    p.topk_idx = static_cast<const int32_t*>(topk_idx.const_data_ptr());
    p.scattered_idx = static_cast<int32_t*>(scattered_idx.mutable_data_ptr());
    p.shared =
        shared_blocks_of(p.geometry, p.grid.num_chunks, shared_blocks, shared_counts, scattered_counts, shared_next);
    STD_TORCH_CHECK(
        run_queries == 8 || run_queries == 16 || run_queries == 32 || run_queries == kQueryTile,
        "run_queries must be 8, 16, 32 or 64");
    STD_TORCH_CHECK(min_queries >= 1 && min_queries <= run_queries, "min_queries out of range");
    STD_TORCH_CHECK(
        p.shared.max_blocks >= kQueryTile * p.geometry.topk / min_queries, "shared_blocks may hold too few blocks");
    p.run_queries = static_cast<int>(run_queries);
    p.min_queries = static_cast<int>(min_queries);
    const DeviceGuard guard(topk_idx.get_device());
    launch_forward_split(p, current_stream(topk_idx));
}

void plan(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t chunk_heads, int64_t chunk_queries, int64_t block_size, bool causal,
    int64_t total_k, int64_t edges_per_item, int64_t min_rest, int64_t num_ranges, int64_t parts, Tensor csr_offsets,
    Tensor csr_edges, Tensor work_items, Tensor next_item, Tensor scratch) {
    ChunkArguments a = {topk_idx,    cu_seqlens_q, cu_seqlens_k, head_begin, head_end,
                        query_begin, query_end,    block_size,   causal,     total_k};
    const ChunkGrid grid = cut_chunks(a, chunk_heads, chunk_queries);
    const Geometry g = make_geometry(a, 1, 1, 8);
    const int64_t ranges = num_ranges * g.num_heads, cells = ranges * g.num_blocks;
    const int64_t groups = ranges * ((g.num_blocks - 1) / kPlanGroup + 1), chunks = grid.num_chunks;
    const int64_t max_items = max_work_items(g, cells, edges_per_item);
    STD_TORCH_CHECK(min_rest >= 1 && min_rest <= edges_per_item, "min_rest out of range");
    STD_TORCH_CHECK(num_ranges >= 1 && ranges <= 65535, "num_ranges out of range");
    STD_TORCH_CHECK(parts >= 1 && parts * chunks <= INT32_MAX, "parts out of range");
    check_buffer(csr_offsets, "csr_offsets", ScalarType::Int, {chunks, cells + 1});
    check_buffer(csr_edges, "csr_edges", ScalarType::Int, {chunks, num_edges_bound(g)});
    check_buffer(work_items, "work_items", ScalarType::Int, {chunks, max_items, 4});
    check_buffer(next_item, "next_item", ScalarType::Int, {chunks, 1});
    check_buffer(scratch, "scratch", ScalarType::Int, {chunks, 2 * groups + cells * parts + cells});
    const DeviceGuard guard(topk_idx.get_device());
    PlanParams p = {};
    p.geometry = g;
    p.grid = grid;
    p.topk_idx = static_cast<const int32_t*>(topk_idx.const_data_ptr());
    p.num_ranges = static_cast<int>(num_ranges);
    p.parts = static_cast<int>(parts);
    p.group_sums = static_cast<EdgesAndItems*>(scratch.mutable_data_ptr());
    p.counts = reinterpret_cast<int32_t*>(p.group_sums + chunks * groups);
    p.cell_edges = p.counts + chunks * cells * parts;
    p.csr_offsets = static_cast<int32_t*>(csr_offsets.mutable_data_ptr());
    p.csr_edges = static_cast<int32_t*>(csr_edges.mutable_data_ptr());
    p.work_items = static_cast<int4*>(work_items.mutable_data_ptr());
    p.next_item = static_cast<int32_t*>(next_item.mutable_data_ptr());
    p.max_items = static_cast<int>(max_items);
    p.edges_per_item = static_cast<int>(edges_per_item);
    p.min_rest = static_cast<int>(min_rest);
    launch_plan(p, current_stream(topk_idx));
}

void forward_main(
    Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin,
    int64_t head_end, int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, double softmax_scale,
    Tensor csr_offsets, Tensor csr_edges, Tensor work_items, Tensor next_item, int64_t edges_per_item, Tensor o_partial,
    Tensor lse_partial, Tensor value_exponent, int64_t arch) {
    const ChunkArguments a = {topk_idx,    cu_seqlens_q, cu_seqlens_k, head_begin, head_end,
                              query_begin, query_end,    block_size,   causal,     k.size(0)};
    const Geometry g = geometry_of_partial(a, o_partial, "o_partial", ScalarType::Half);
    const ScalarType dtype = q.scalar_type();
    const int64_t num_kv_heads = topk_idx.size(0), total_q = topk_idx.size(1);
    check_buffer(
        lse_partial, "lse_partial", ScalarType::Float, {g.num_heads, g.num_queries, g.topk, g.subs, g.group_size});
    check_buffer(value_exponent, "value_exponent", ScalarType::Int, {g.num_heads, g.num_blocks, g.subs});

    ForwardMainParams p = {};
    p.geometry = g;
    p.plan = plan_view(g, csr_offsets, csr_edges, work_items, next_item, edges_per_item);
    p.q = row_tensor(q, "q", dtype, total_q, num_kv_heads * g.group_size, g.head_dim);
    p.k = row_tensor(k, "k", dtype, k.size(0), num_kv_heads, g.head_dim);
    p.v = row_tensor(v, "v", dtype, k.size(0), num_kv_heads, g.head_dim);
    p.softmax_scale_log2 = scale_log2(softmax_scale);
    p.o_partial = static_cast<__half*>(o_partial.mutable_data_ptr());
    p.lse_partial = static_cast<float*>(lse_partial.mutable_data_ptr());
    p.value_exponent = static_cast<int32_t*>(value_exponent.mutable_data_ptr());

    const DeviceGuard guard(q.get_device());
    const cudaStream_t stream = current_stream(q);
    dispatch_dtype(is_bf16(q), [&](auto t) {
        dispatch_head_dim(g.head_dim, [&](auto head_dim) {
            dispatch_forward_tile_k<head_dim>(g.block_size / g.subs, [&](auto tile_k) {
                dispatch_arch<true>(
                    arch, [&] { launch_forward_main<decltype(t), head_dim, tile_k>(p, stream); },
                    [&] { launch_forward_main_sm90<decltype(t), head_dim, tile_k>(p, stream); });
            });
        });
    });
}

void forward_shared(
    Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin,
    int64_t head_end, int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, double softmax_scale,
    Tensor shared_blocks, Tensor shared_counts, Tensor scattered_counts, Tensor shared_next, Tensor o_partial,
    Tensor lse_partial, Tensor value_exponent, Tensor out, Tensor lse) {
    const ChunkArguments a = {topk_idx,    cu_seqlens_q, cu_seqlens_k, head_begin, head_end,
                              query_begin, query_end,    block_size,   causal,     k.size(0)};
    const Geometry g = geometry_of_partial(a, o_partial, "o_partial", ScalarType::Half);
    const ScalarType dtype = q.scalar_type();
    const int64_t num_kv_heads = topk_idx.size(0), total_q = topk_idx.size(1);
    if (g.block_size % kSharedKeys != 0) no_instantiation("shared blocks of block_size", g.block_size);
    if (g.group_size % kSharedHeads != 0) no_instantiation("shared blocks of group_size", g.group_size);

    ForwardSharedParams p = {};
    static_cast<ForwardReduceParams&>(p) =
        reduce_params(g, topk_idx, o_partial, lse_partial, value_exponent, out, lse, dtype);
    p.shared = shared_blocks_of(g, 1, shared_blocks, shared_counts, scattered_counts, shared_next);
    p.q = row_tensor(q, "q", dtype, total_q, num_kv_heads * g.group_size, g.head_dim);
    p.k = row_tensor(k, "k", dtype, k.size(0), num_kv_heads, g.head_dim);
    p.v = row_tensor(v, "v", dtype, k.size(0), num_kv_heads, g.head_dim);
    p.softmax_scale_log2 = scale_log2(softmax_scale);

    const DeviceGuard guard(q.get_device());
    const cudaStream_t stream = current_stream(q);
    dispatch_dtype(is_bf16(q), [&](auto t) {
        dispatch_head_dim(g.head_dim, [&](auto head_dim) {
            dispatch_arch<true>(90, [] {}, [&] { launch_forward_shared_sm90<decltype(t), head_dim>(p, stream); });
        });
    });
}

void forward_reduce(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, int64_t total_k, Tensor o_partial,
    Tensor lse_partial, Tensor value_exponent, Tensor out, Tensor lse) {
    const ChunkArguments a = {topk_idx,    cu_seqlens_q, cu_seqlens_k, head_begin, head_end,
                              query_begin, query_end,    block_size,   causal,     total_k};
    const Geometry g = geometry_of_partial(a, o_partial, "o_partial", ScalarType::Half);
    const ForwardReduceParams p =
        reduce_params(g, topk_idx, o_partial, lse_partial, value_exponent, out, lse, out.scalar_type());

    const DeviceGuard guard(out.get_device());
    const cudaStream_t stream = current_stream(out);
    dispatch_dtype(is_bf16(out), [&](auto t) { launch_forward_reduce<decltype(t)>(p, stream); });
}

void backward_preprocess(Tensor out, Tensor dout, std::optional<Tensor> dlse, Tensor delta) {
    const int64_t total_q = out.size(0), num_heads = out.size(1), head_dim = out.size(2);
    STD_TORCH_CHECK(total_q <= INT32_MAX && num_heads <= INT32_MAX, "too many rows");
    check_buffer(delta, "delta", ScalarType::Float, {num_heads, total_q});
    if (dlse.has_value()) check_buffer(*dlse, "dlse", ScalarType::Float, {num_heads, total_q});

    BackwardPreprocessParams p = {};
    p.out = row_tensor(out, "out", out.scalar_type(), total_q, num_heads, head_dim);
    p.dout = row_tensor(dout, "dout", out.scalar_type(), total_q, num_heads, head_dim);
    p.dlse = dlse.has_value() ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr;
    p.delta = static_cast<float*>(delta.mutable_data_ptr());
    p.total_q = static_cast<int>(total_q);
    p.num_heads = static_cast<int>(num_heads);
    p.head_dim = static_cast<int>(head_dim);

    const DeviceGuard guard(out.get_device());
    const cudaStream_t stream = current_stream(out);
    dispatch_dtype(is_bf16(out), [&](auto t) { launch_backward_preprocess<decltype(t)>(p, stream); });
}

void backward_main(
    Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin,
    int64_t head_end, int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, double softmax_scale,
    Tensor csr_offsets, Tensor csr_edges, Tensor work_items, Tensor next_item, int64_t edges_per_item, Tensor dout,
    Tensor lse, Tensor delta, Tensor dq_partial, Tensor dk, Tensor dv, Tensor dkv_pieces, bool accumulate,
    int64_t arch) {
    const ChunkArguments a = {topk_idx,    cu_seqlens_q, cu_seqlens_k, head_begin, head_end,
                              query_begin, query_end,    block_size,   causal,     k.size(0)};
    const ScalarType dtype = q.scalar_type();
    const Geometry g = geometry_of_partial(a, dq_partial, "dq_partial", dtype);
    const int64_t num_kv_heads = topk_idx.size(0), total_q = topk_idx.size(1), num_heads = num_kv_heads * g.group_size;
    check_buffer(lse, "lse", ScalarType::Float, {num_heads, total_q});
    check_buffer(delta, "delta", ScalarType::Float, {num_heads, total_q});

    // Pieces are numbered by cells that know no query ranges.
    check_buffer(csr_offsets, "csr_offsets", ScalarType::Int, {static_cast<int64_t>(g.num_heads) * g.num_blocks + 1});

    BackwardMainParams p = {};
    p.geometry = g;
    p.plan = plan_view(g, csr_offsets, csr_edges, work_items, next_item, edges_per_item);
    p.q = row_tensor(q, "q", dtype, total_q, num_heads, g.head_dim);
    p.k = row_tensor(k, "k", dtype, k.size(0), num_kv_heads, g.head_dim);
    p.v = row_tensor(v, "v", dtype, k.size(0), num_kv_heads, g.head_dim);
    p.dout = row_tensor(dout, "dout", dtype, total_q, num_heads, g.head_dim);
    p.lse = static_cast<const float*>(lse.const_data_ptr());
    p.delta = static_cast<const float*>(delta.const_data_ptr());
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.softmax_scale_log2 = scale_log2(softmax_scale);
    p.dq_partial = dq_partial.mutable_data_ptr();
    p.gradients = key_value_gradients(g, dk, dv, dkv_pieces, dtype, edges_per_item, accumulate);

    const DeviceGuard guard(q.get_device());
    const cudaStream_t stream = current_stream(q);
    dispatch_dtype(is_bf16(q), [&](auto t) {
        dispatch_head_dim(g.head_dim, [&](auto head_dim) {
            dispatch_backward_tile_k<head_dim>(g.block_size / g.subs, [&](auto tile_k) {
                dispatch_arch<has_backward_sm90(head_dim, tile_k)>(
                    arch, [&] { launch_backward_main<decltype(t), head_dim, tile_k>(p, stream); },
                    [&] { launch_backward_main_sm90<decltype(t), head_dim, tile_k>(p, stream); });
            });
        });
    });
}

void backward_reduce(
    Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, int64_t block_size, bool causal, int64_t total_k, Tensor csr_offsets,
    int64_t edges_per_item, Tensor dq_partial, Tensor dkv_pieces, Tensor dq, Tensor dk, Tensor dv, bool accumulate) {
    const ChunkArguments a = {topk_idx,    cu_seqlens_q, cu_seqlens_k, head_begin, head_end,
                              query_begin, query_end,    block_size,   causal,     total_k};
    const ScalarType dtype = dq.scalar_type();
    const Geometry g = geometry_of_partial(a, dq_partial, "dq_partial", dtype);
    const int64_t num_kv_heads = topk_idx.size(0), total_q = topk_idx.size(1);
    STD_TORCH_CHECK(edges_per_item >= 1 && edges_per_item <= INT32_MAX, "edges_per_item out of range");
    check_buffer(csr_offsets, "csr_offsets", ScalarType::Int, {static_cast<int64_t>(g.num_heads) * g.num_blocks + 1});
    check_buffer(dq, "dq", dtype, {total_q, num_kv_heads * g.group_size, g.head_dim});

    BackwardReduceParams p = {};
    p.geometry = g;
    p.topk_idx = static_cast<const int32_t*>(topk_idx.const_data_ptr());
    p.csr_offsets = static_cast<const int32_t*>(csr_offsets.const_data_ptr());
    p.edges_per_item = static_cast<int>(edges_per_item);
    p.dq_partial = dq_partial.const_data_ptr();
    p.dq = dq.mutable_data_ptr();
    p.num_kv_heads = static_cast<int>(num_kv_heads);
    p.gradients = key_value_gradients(g, dk, dv, dkv_pieces, dtype, edges_per_item, accumulate);

    const DeviceGuard guard(dq.get_device());
    const cudaStream_t stream = current_stream(dq);
    dispatch_dtype(is_bf16(dq), [&](auto t) { launch_backward_reduce<decltype(t)>(p, stream); });
}

}  // namespace fsa
