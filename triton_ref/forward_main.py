"""forward_main: the attention of a work item's query rows to the keys of its block, and to nothing else.

A program owns one sub-block (TILE_K keys) of one work item. It loads K and V once and walks the rows in tiles of
TILE_Q: S = Q K^T, softmax inside the sub-block, O = P V. Each row leaves a partial output, normalised by its own sum,
and its lse.

A normalised partial is a convex combination of rows of V, so its range is that of V: times 2^-value_exponent it fits
fp16, with 11 bits of mantissa where bf16 keeps 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.problem import Chunk, Plan, Problem
from triton_ref.common import (
    INFINITY,
    LOG2_E,
    SIZES,
    exp2_difference,
    first_block,
    is_finite,
    last_visible_key,
    load_rows,
    load_work_item,
    matmul,
    padded_dim,
    partial_rows,
    power_of_two,
    sequence_bounds,
    store_rows,
    work_item_rows,
)

# Bounds of value_exponent by dtype of V. bf16 as far as 2^-exponent is finite; fp16 values only ever need scaling down;
# fp32 partials need none.
VALUE_EXPONENT_RANGE = {torch.bfloat16: (-100, 120), torch.float16: (0, 120), torch.float32: (0, 0)}


@triton.jit
def exponent_of_values(v_tile, MIN_EXPONENT: tl.constexpr, MAX_EXPONENT: tl.constexpr):
    """Power of two e such that convex combinations of these (finite) rows, times 2^-e, stay below 2^15."""
    largest = tl.max(tl.abs(v_tile.to(tl.float32)))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127 - 14  # floor(log2(largest)) - 14
    exponent = tl.minimum(tl.maximum(exponent, MIN_EXPONENT), MAX_EXPONENT)
    return tl.where(largest > 0, exponent, 0)


@triton.jit
def sees_any(visible, flags):
    """[TILE_Q, TILE_K] and [TILE_K, PADDED_DIM] -> [TILE_Q, PADDED_DIM]: whether a row sees a flagged element."""
    return matmul(visible.to(tl.float16), flags.to(tl.float16)) > 0


@triton.jit(do_not_specialize=SIZES)
def forward_main_kernel(
    q,  # [total_q, num_heads, head_dim]
    k,  # [total_k, num_kv_heads, head_dim]
    v,  # [total_k, num_kv_heads, head_dim]
    csr_edges,
    work_items,
    cu_seqlens_q,
    cu_seqlens_k,
    o_partial,  # [num_heads, num_queries, topk, SUBS, GROUP_SIZE, head_dim], times 2^-value_exponent
    lse_partial,  # [num_heads, num_queries, topk, SUBS, GROUP_SIZE], log2
    value_exponent,  # [num_heads, num_blocks, SUBS]
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    total_q,
    total_k,
    topk,
    num_blocks,
    head_begin,
    query_begin,
    edges_per_head,
    softmax_scale_log2,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    SUBS: tl.constexpr = BLOCK_SIZE // TILE_K
    cell, edge_begin, edge_end, sequence = load_work_item(work_items, tl.program_id(0) // SUBS)
    if cell < 0:
        return
    sub = tl.program_id(0) % SUBS
    head = cell // num_blocks  # of the chunk
    kv_head = (head + head_begin).to(tl.int64)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens_q, total_q)
    k_begin, k_len = sequence_bounds(sequence, cu_seqlens_k, total_k)
    block_id = cell % num_blocks - first_block(k_begin, sequence, BLOCK_SIZE)

    # K and V of the sub-block; keys past the end of the sequence are zero
    first_key = block_id * BLOCK_SIZE + sub * TILE_K
    keys = first_key + tl.arange(0, TILE_K)
    tokens = (k_begin + keys).to(tl.int64)
    in_sequence = keys < k_len
    v_offsets = tokens * v_token_stride + kv_head * v_head_stride
    k_tile = load_rows(k, tokens * k_token_stride + kv_head * k_head_stride, in_sequence, HEAD_DIM, PADDED_DIM)
    v_raw = load_rows(v, v_offsets, in_sequence, HEAD_DIM, PADDED_DIM)
    finite = is_finite(v_raw)
    v_tile = tl.where(finite, v_raw, 0.0)  # a masked key has P = 0, and 0 times NaN is NaN
    has_nonfinite = tl.min(finite.to(tl.int32)) == 0

    exponent = exponent_of_values(v_tile, MIN_EXPONENT, MAX_EXPONENT)
    tl.store(value_exponent + cell.to(tl.int64) * SUBS + sub, exponent)  # the same from every item of the cell

    num_rows = (edge_end - edge_begin) * GROUP_SIZE
    for row_begin in range(0, num_rows, TILE_Q):
        edge, group, exists = work_item_rows(csr_edges, edge_begin, edge_end, row_begin, GROUP_SIZE, TILE_Q)
        query = query_begin + edge // topk
        last_key = last_visible_key(query, q_begin, q_len, k_len, CAUSAL)
        attends = exists & (first_key <= last_key)

        # gather the query rows
        q_offsets = query.to(tl.int64) * q_token_stride + (kv_head * GROUP_SIZE + group) * q_head_stride
        q_tile = load_rows(q, q_offsets, attends, HEAD_DIM, PADDED_DIM)

        # softmax inside the sub-block, in base 2
        visible = attends[:, None] & (keys[None, :] <= last_key[:, None])
        scores = tl.where(visible, matmul(q_tile, tl.trans(k_tile)) * softmax_scale_log2, -INFINITY)
        row_max = tl.max(scores, 1)
        probs = exp2_difference(scores, row_max[:, None])
        row_sum = tl.sum(probs, 1)
        row_sum = tl.where(attends, row_sum, 1.0)
        output = matmul(probs.to(v_tile.dtype), v_tile) * (power_of_two(-exponent) / row_sum)[:, None]

        # store the partial
        rows = partial_rows(head, edges_per_head, edge, sub, group, SUBS, GROUP_SIZE)
        tl.store(lse_partial + rows, row_max + tl.log2(row_sum), mask=attends)
        store_rows(o_partial, rows * HEAD_DIM, output, attends, HEAD_DIM, PADDED_DIM)

    # Rare: give NaN and infinities of V back to the rows that see them, and to them alone.
    if has_nonfinite:
        tl.debug_barrier()  # the partials stored above are read here by other threads
        v_raw = load_rows(v, v_offsets, in_sequence, HEAD_DIM, PADDED_DIM)
        nonfinite = is_finite(v_raw) == 0
        for row_begin in range(0, num_rows, TILE_Q):
            edge, group, exists = work_item_rows(csr_edges, edge_begin, edge_end, row_begin, GROUP_SIZE, TILE_Q)
            last_key = last_visible_key(query_begin + edge // topk, q_begin, q_len, k_len, CAUSAL)
            attends = exists & (first_key <= last_key)
            visible = attends[:, None] & (keys[None, :] <= last_key[:, None])
            missing = tl.where(sees_any(visible, nonfinite & (v_raw != -INFINITY)), INFINITY, 0.0)
            missing += tl.where(sees_any(visible, nonfinite & (v_raw != INFINITY)), -INFINITY, 0.0)  # inf - inf: NaN

            rows = partial_rows(head, edges_per_head, edge, sub, group, SUBS, GROUP_SIZE)
            output = load_rows(o_partial, rows * HEAD_DIM, attends, HEAD_DIM, PADDED_DIM)
            store_rows(o_partial, rows * HEAD_DIM, output + missing, attends, HEAD_DIM, PADDED_DIM)


def row_tile(dtype: torch.dtype, tile_k: int, padded: int) -> dict[str, int]:
    """Rows of a tile, warps and pipeline stages such that registers do not spill (sm80, sm90)."""
    if dtype == torch.float32:  # plain fp32 arithmetic, no matrix instructions
        return {"TILE_Q": 16, "num_warps": 8, "num_stages": 1}
    return {"TILE_Q": 64, "num_warps": 4 if max(tile_k, 64) * padded <= 64 * 128 else 8, "num_stages": 2}


def forward_main(
    problem: Problem,
    chunk: Chunk,
    plan: Plan,
    o_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    value_exponent: torch.Tensor,
) -> None:
    """Fill the partial outputs of every (query, slot, sub-block) in which the query sees a key.

    Args:
        problem: the call.
        chunk: the KV heads and query tokens to do.
        plan: of this chunk.
        o_partial: [num_heads, num_queries, topk, subs, group_size, head_dim], fp16 (fp32 for fp32 inputs); normalised
            partial outputs times 2^-value_exponent.
        lse_partial: [num_heads, num_queries, topk, subs, group_size], fp32, log2.
        value_exponent: [num_heads, num_blocks, subs], int32.
    """
    subs = o_partial.shape[3]
    tile_k = problem.block_size // subs
    min_exponent, max_exponent = VALUE_EXPONENT_RANGE[problem.v.dtype]
    padded = padded_dim(problem.head_dim)
    forward_main_kernel[(plan.work_items.shape[0] * subs,)](
        problem.q,
        problem.k,
        problem.v,
        plan.csr_edges,
        plan.work_items,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        o_partial,
        lse_partial,
        value_exponent,
        *problem.q.stride()[:2],
        *problem.k.stride()[:2],
        *problem.v.stride()[:2],
        total_q=problem.total_q,
        total_k=problem.total_k,
        topk=problem.topk,
        num_blocks=problem.num_blocks,
        head_begin=chunk.head_begin,
        query_begin=chunk.query_begin,
        edges_per_head=chunk.num_queries * problem.topk,
        softmax_scale_log2=problem.softmax_scale * LOG2_E.value,
        MIN_EXPONENT=min_exponent,
        MAX_EXPONENT=max_exponent,
        CAUSAL=problem.causal,
        BLOCK_SIZE=problem.block_size,
        GROUP_SIZE=problem.group_size,
        HEAD_DIM=problem.head_dim,
        PADDED_DIM=padded,
        TILE_K=tile_k,
        **row_tile(problem.q.dtype, tile_k, padded),
    )
