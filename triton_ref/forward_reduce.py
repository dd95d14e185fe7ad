"""forward_reduce: online softmax across the slots of a query.

Every slot (and sub-block) of a query left a normalised partial output and its lse. With M = max lse and
w = 2^(lse - M): out = sum(w * o) / sum(w), lse = M + log2(sum(w)). Which slots count is asked of topk_idx, never of the
buffers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.problem import Chunk, Problem
from triton_ref.common import (
    INFINITY,
    LN_2,
    SIZES,
    chunk_rows,
    exp2_difference,
    load_rows,
    padded_dim,
    partial_rows,
    power_of_two,
    reduce_tile_rows,
    slot_attends,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def forward_reduce_kernel(
    topk_idx,  # [num_kv_heads, total_q, topk], int32
    o_partial,  # [num_heads, num_queries, topk, SUBS, GROUP_SIZE, head_dim], times 2^-value_exponent
    lse_partial,  # [num_heads, num_queries, topk, SUBS, GROUP_SIZE], log2
    value_exponent,  # [num_heads, num_blocks, SUBS]
    out,  # [total_q, num_heads, head_dim]
    lse,  # [num_heads, total_q], natural log
    cu_seqlens_q,
    cu_seqlens_k,
    batch,
    total_q,
    total_k,
    topk,
    num_blocks,
    num_kv_heads,
    head_begin,
    query_begin,
    query_end,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SUBS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)  # of the chunk
    query, group, last_key, block_base, exists = chunk_rows(
        tl.program_id(0), query_begin, query_end, cu_seqlens_q, cu_seqlens_k, batch, total_q, total_k,
        CAUSAL, BLOCK_SIZE, GROUP_SIZE, TILE_ROWS,
    )  # fmt: skip
    slots = topk_idx + ((head_begin + head) * total_q + query) * topk

    row_max = tl.full([TILE_ROWS], -INFINITY, tl.float32)
    row_sum = tl.zeros([TILE_ROWS], tl.float32)
    output = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    for slot in range(topk):
        block_id = tl.load(slots + slot, mask=exists, other=-1)
        for sub in range(SUBS):
            attends = slot_attends(block_id, sub * (BLOCK_SIZE // SUBS), last_key, BLOCK_SIZE)
            edge = (query - query_begin) * topk + slot
            rows = partial_rows(head, (query_end - query_begin) * topk, edge, sub, group, SUBS, GROUP_SIZE)
            slot_lse = tl.load(lse_partial + rows, mask=attends, other=-INFINITY)
            slot_output = load_rows(o_partial, rows * HEAD_DIM, attends, HEAD_DIM, PADDED_DIM)
            sub_block = (head * num_blocks + block_base + block_id) * SUBS + sub
            exponent = tl.load(value_exponent + sub_block, mask=attends, other=0)

            new_max = tl.maximum(row_max, slot_lse)
            keep = exp2_difference(row_max, new_max)
            weight = exp2_difference(slot_lse, new_max)
            output = output * keep[:, None] + slot_output * (weight * power_of_two(exponent))[:, None]
            row_sum = row_sum * keep + weight
            row_max = new_max

    # A query that attends to nothing: out = 0, lse = -inf. (A maximum passes over NaN, a sum does not.)
    empty = (row_max == -INFINITY) & (row_sum == 0.0)
    row_sum = tl.where(empty, 1.0, row_sum)
    q_head = (head_begin + head) * GROUP_SIZE + group
    row = query.to(tl.int64) * (num_kv_heads * GROUP_SIZE) + q_head
    store_rows(out, row * HEAD_DIM, output / row_sum[:, None], exists, HEAD_DIM, PADDED_DIM)
    tl.store(lse + q_head * total_q + query, (row_max + tl.log2(row_sum)) * LN_2, mask=exists)


def forward_reduce(
    problem: Problem,
    chunk: Chunk,
    o_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    value_exponent: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge the partials of forward_main into every row of the chunk in out and lse.

    Args:
        problem: the call.
        chunk: the KV heads and query tokens to do.
        o_partial, lse_partial, value_exponent: as forward_main left them.
        out: [total_q, num_heads, head_dim], input dtype.
        lse: [num_heads, total_q], fp32, natural log.
    """
    padded = padded_dim(problem.head_dim)
    tile_rows = reduce_tile_rows(padded)
    num_rows = chunk.num_queries * problem.group_size
    forward_reduce_kernel[(triton.cdiv(num_rows, tile_rows), chunk.num_heads)](
        problem.topk_idx,
        o_partial,
        lse_partial,
        value_exponent,
        out,
        lse,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        batch=problem.batch,
        total_q=problem.total_q,
        total_k=problem.total_k,
        topk=problem.topk,
        num_blocks=problem.num_blocks,
        num_kv_heads=problem.num_kv_heads,
        head_begin=chunk.head_begin,
        query_begin=chunk.query_begin,
        query_end=chunk.query_end,
        CAUSAL=problem.causal,
        BLOCK_SIZE=problem.block_size,
        SUBS=o_partial.shape[3],
        GROUP_SIZE=problem.group_size,
        HEAD_DIM=problem.head_dim,
        PADDED_DIM=padded,
        TILE_ROWS=tile_rows,
    )
