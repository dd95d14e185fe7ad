#include "bindings/selection.h"

#include "dispatch.h"
#include "host/arguments.h"
#include "host/checks.h"
#include "host/context.h"
#include "selection/block_scores.h"
#include "selection/select_topk.h"

namespace fsa {
namespace {

Sequences sequences_of(
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t total_q, int64_t total_k, int64_t query_begin,
    int64_t query_end) {
    const int64_t batch = cu_seqlens_q.numel() - 1;
    STD_TORCH_CHECK(batch >= 1, "empty problem");
    check_buffer(cu_seqlens_q, "cu_seqlens", ScalarType::Int, {batch + 1});
    check_buffer(cu_seqlens_k, "compressed_cu_seqlens", ScalarType::Int, {batch + 1});
    STD_TORCH_CHECK(0 <= query_begin && query_begin < query_end && query_end <= total_q, "queries out of range");
    STD_TORCH_CHECK(total_q <= INT32_MAX / 2 && total_k <= INT32_MAX / 2 && batch <= INT32_MAX / 2, "too many rows");
    return {
        static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()),
        static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr()), static_cast<int>(batch), static_cast<int>(total_q),
        static_cast<int>(total_k)};
}

// Scores of a chunk have room for the blocks up to the last query's own, in whichever sequence it is.
void check_scores(
    const Tensor& scores, int64_t num_queries, int64_t num_kv_heads, int64_t query_end, int64_t block_size) {
    STD_TORCH_CHECK(scores.dim() == 3, "scores must have 3 dimensions");
    check_buffer(scores, "scores", ScalarType::Float, {num_queries, num_kv_heads, scores.size(2)});
    STD_TORCH_CHECK(block_size >= 1 && block_size <= INT32_MAX / 2, "block_size out of range");
    STD_TORCH_CHECK(
        scores.size(2) >= (query_end + block_size - 1) / block_size, "scores must have room for all blocks");
    STD_TORCH_CHECK(scores.size(2) <= INT32_MAX && num_kv_heads >= 1 && num_kv_heads <= INT32_MAX, "too many scores");
}

int log2_of(int64_t power) {
    int exponent = 0;
    while (int64_t{1} << exponent < power) ++exponent;
    return exponent;
}

}  // namespace

void block_scores(
    Tensor q, Tensor compressed_k, Tensor lse, Tensor cu_seqlens, Tensor compressed_cu_seqlens, int64_t query_begin,
    int64_t query_end, int64_t kernel_size, int64_t kernel_stride, int64_t block_size, double softmax_scale,
    Tensor scores) {
    const ScalarType dtype = q.scalar_type();
    const int64_t total_q = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
    const int64_t total_k = compressed_k.size(0), num_kv_heads = compressed_k.size(1);
    STD_TORCH_CHECK(
        total_k >= 1 && num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0, "heads must form groups");
    STD_TORCH_CHECK(head_dim > 0 && head_dim % 8 == 0, "head_dim must be a multiple of 8");
    STD_TORCH_CHECK(
        kernel_stride >= 1 && kernel_size % kernel_stride == 0 && block_size % kernel_stride == 0 &&
            kernel_size >= kernel_stride && kernel_size <= block_size,
        "windows and blocks must be made of whole strides");
    check_scores(scores, query_end - query_begin, num_kv_heads, query_end, block_size);
    const int64_t ratio = block_size / kernel_stride;
    if (!has_block_scores(static_cast<int>(ratio))) no_instantiation("strides of a block", static_cast<int>(ratio));
    check_buffer(lse, "lse", ScalarType::Float, {num_heads, total_q});

    BlockScoresParams p = {};
    p.sequences = sequences_of(cu_seqlens, compressed_cu_seqlens, total_q, total_k, query_begin, query_end);
    p.q = row_tensor(q, "q", dtype, total_q, num_heads, head_dim);
    p.k = row_tensor(compressed_k, "compressed_k", dtype, total_k, num_kv_heads, head_dim);
    p.lse = static_cast<const float*>(lse.const_data_ptr());
    p.scores = static_cast<float*>(scores.mutable_data_ptr());
    p.scores_stride = static_cast<int>(scores.size(2));
    p.query_begin = static_cast<int>(query_begin);
    p.query_end = static_cast<int>(query_end);
    p.num_kv_heads = static_cast<int>(num_kv_heads);
    p.group_size = static_cast<int>(num_heads / num_kv_heads);
    p.head_dim = static_cast<int>(head_dim);
    p.block_size = static_cast<int>(block_size);
    p.kernel_size = static_cast<int>(kernel_size);
    p.kernel_stride = static_cast<int>(kernel_stride);
    p.log2_ratio = log2_of(ratio);
    p.span = static_cast<int>(kernel_size / kernel_stride);
    p.softmax_scale_log2 = scale_log2(softmax_scale);
    p.by_kernel_stride = FastDivider(p.kernel_stride);

    const DeviceGuard guard(q.get_device());
    const cudaStream_t stream = current_stream(q);
    dispatch_dtype(is_bf16(q), [&](auto t) {
        dispatch_head_dim(p.head_dim, [&](auto width) {
            dispatch_arch<true>(90, [] {}, [&] { launch_block_scores_sm90<decltype(t), width>(p, stream); });
        });
    });
}

void select_topk(
    Tensor scores, Tensor cu_seqlens, int64_t query_begin, int64_t query_end, int64_t block_size, int64_t init_blocks,
    int64_t local_blocks, Tensor topk_idx) {
    STD_TORCH_CHECK(topk_idx.dim() == 3, "topk_idx must have 3 dimensions");
    const int64_t num_kv_heads = topk_idx.size(0), total_q = topk_idx.size(1), topk = topk_idx.size(2);
    check_buffer(topk_idx, "topk_idx", ScalarType::Int, {num_kv_heads, total_q, topk});
    check_scores(scores, query_end - query_begin, num_kv_heads, query_end, block_size);
    STD_TORCH_CHECK(
        init_blocks >= 0 && local_blocks >= 0 && init_blocks + local_blocks <= topk && topk <= INT32_MAX,
        "topk must have room for the forced blocks");

    SelectTopkParams p = {};
    p.sequences = sequences_of(cu_seqlens, cu_seqlens, total_q, total_q, query_begin, query_end);
    p.scores = static_cast<const float*>(scores.const_data_ptr());
    p.topk_idx = static_cast<int32_t*>(topk_idx.mutable_data_ptr());
    p.scores_stride = static_cast<int>(scores.size(2));
    p.query_begin = static_cast<int>(query_begin);
    p.query_end = static_cast<int>(query_end);
    p.num_kv_heads = static_cast<int>(num_kv_heads);
    p.block_size = static_cast<int>(block_size);
    p.topk = static_cast<int>(topk);
    p.init_blocks = static_cast<int>(init_blocks);
    p.local_blocks = static_cast<int>(local_blocks);

    const DeviceGuard guard(scores.get_device());
    launch_select_topk(p, current_stream(scores));
}

}  // namespace fsa
