"""backward_main: dK and dV of a work item's block, and the part of dQ that this block gives to each of its rows.

A program owns one sub-block (TILE_K keys) of one work item and walks the rows in tiles of TILE_Q, as in the forward:
S = Q K^T, P = exp(S - lse), dV += P^T dO, dP = dO V^T, dS = P * (dP - delta), dK += dS^T Q, and dS K is dQ's partial.
dK and dV stay in registers. If the item is all of its cell they go straight to dk and dv; the items of a cut cell leave
pieces that backward_reduce sums in order.
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
    sequence_bounds,
    store_gradient_rows,
    store_rows,
    work_item_rows,
)


@triton.jit(do_not_specialize=SIZES)
def backward_main_kernel(
    q,  # [total_q, num_heads, head_dim]
    k,  # [total_k, num_kv_heads, head_dim]
    v,  # [total_k, num_kv_heads, head_dim]
    dout,  # [total_q, num_heads, head_dim]
    lse,  # [num_heads, total_q], natural log
    delta,  # [num_heads, total_q]
    csr_offsets,
    csr_edges,
    work_items,
    cu_seqlens_q,
    cu_seqlens_k,
    dq_partial,  # [num_heads, num_queries, topk, SUBS, GROUP_SIZE, head_dim]
    dk,  # [total_k, num_heads, head_dim]
    dv,  # [total_k, num_heads, head_dim]
    dkv_pieces,  # [max_pieces, SUBS, 2, TILE_K, head_dim]
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    dout_token_stride,
    dout_head_stride,
    dk_token_stride,
    dk_head_stride,
    dv_token_stride,
    dv_head_stride,
    total_q,
    total_k,
    topk,
    num_blocks,
    head_begin,
    query_begin,
    edges_per_head,
    edges_per_item,
    softmax_scale,
    softmax_scale_log2,
    ACCUMULATE: tl.constexpr,
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
    head = (cell // num_blocks).to(tl.int64)  # of the chunk
    kv_head = head + head_begin
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens_q, total_q)
    k_begin, k_len = sequence_bounds(sequence, cu_seqlens_k, total_k)
    block_id = cell % num_blocks - first_block(k_begin, sequence, BLOCK_SIZE)

    # K and V of the sub-block; keys past the end of the sequence are zero
    first_key = block_id * BLOCK_SIZE + sub * TILE_K
    keys = first_key + tl.arange(0, TILE_K)
    tokens = (k_begin + keys).to(tl.int64)
    in_sequence = keys < k_len
    k_tile = load_rows(k, tokens * k_token_stride + kv_head * k_head_stride, in_sequence, HEAD_DIM, PADDED_DIM)
    v_tile = load_rows(v, tokens * v_token_stride + kv_head * v_head_stride, in_sequence, HEAD_DIM, PADDED_DIM)

    # A masked key has dS = 0, and 0 times NaN is NaN: keys enter dS K without NaN and infinities. These come back
    # through the scores, so that a query that sees such a key, and no other, has NaN gradients.
    k_finite = is_finite(k_tile)
    k_tile = tl.where(k_finite, k_tile, 0.0)
    key_is_finite = tl.min(k_finite.to(tl.int32), 1) > 0
    key_bias = tl.where(key_is_finite, 0.0, float("nan"))

    dk_tile = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv_tile = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    for row_begin in range(0, (edge_end - edge_begin) * GROUP_SIZE, TILE_Q):
        edge, group, exists = work_item_rows(csr_edges, edge_begin, edge_end, row_begin, GROUP_SIZE, TILE_Q)
        query = query_begin + edge // topk
        last_key = last_visible_key(query, q_begin, q_len, k_len, CAUSAL)
        attends = exists & (first_key <= last_key)

        # gather the rows of Q, dO, lse and delta
        token = query.to(tl.int64)
        q_head = kv_head * GROUP_SIZE + group
        q_tile = load_rows(q, token * q_token_stride + q_head * q_head_stride, attends, HEAD_DIM, PADDED_DIM)
        dout_offsets = token * dout_token_stride + q_head * dout_head_stride
        dout_tile = load_rows(dout, dout_offsets, attends, HEAD_DIM, PADDED_DIM)
        row_lse = tl.load(lse + q_head * total_q + token, mask=attends, other=-INFINITY) * LOG2_E
        row_delta = tl.load(delta + q_head * total_q + token, mask=attends, other=0.0)

        visible = attends[:, None] & (keys[None, :] <= last_key[:, None])
        scores = matmul(q_tile, tl.trans(k_tile)) * softmax_scale_log2 + key_bias[None, :]
        probs = tl.where(visible, exp2_difference(scores, row_lse[:, None]), 0.0)
        dprobs = matmul(dout_tile, tl.trans(v_tile))
        dscores = tl.where(visible, probs * (dprobs - row_delta[:, None]), 0.0).to(q_tile.dtype)

        dv_tile += matmul(tl.trans(probs.to(dout_tile.dtype)), dout_tile)
        dk_tile += matmul(tl.trans(dscores), q_tile)
        dq_tile = matmul(dscores, k_tile) * softmax_scale
        rows = partial_rows(head, edges_per_head, edge, sub, group, SUBS, GROUP_SIZE)
        store_rows(dq_partial, rows * HEAD_DIM, dq_tile, attends, HEAD_DIM, PADDED_DIM)
    dk_tile *= softmax_scale

    cell_begin = tl.load(csr_offsets + cell).to(tl.int64)
    cell_end = tl.load(csr_offsets + cell + 1)
    if cell_end - cell_begin > edges_per_item:
        piece = 2 * cell_begin // edges_per_item + (edge_begin - cell_begin) // edges_per_item
        dk_rows = (piece * SUBS + sub) * 2 * TILE_K + tl.arange(0, TILE_K)
        every_row = keys >= 0
        store_rows(dkv_pieces, dk_rows * HEAD_DIM, dk_tile, every_row, HEAD_DIM, PADDED_DIM)
        store_rows(dkv_pieces, (dk_rows + TILE_K) * HEAD_DIM, dv_tile, every_row, HEAD_DIM, PADDED_DIM)
    else:
        dk_offsets = tokens * dk_token_stride + head * dk_head_stride
        dv_offsets = tokens * dv_token_stride + head * dv_head_stride
        store_gradient_rows(dk, dk_offsets, dk_tile, in_sequence, ACCUMULATE, HEAD_DIM, PADDED_DIM)
        store_gradient_rows(dv, dv_offsets, dv_tile, in_sequence, ACCUMULATE, HEAD_DIM, PADDED_DIM)


def row_tile(dtype: torch.dtype, padded: int) -> dict[str, int]:
    """Rows of a tile, warps and pipeline stages such that registers hardly spill (sm80, sm90)."""
    if dtype == torch.float32:  # plain fp32 arithmetic, no matrix instructions
        return {"TILE_Q": 16, "num_warps": 8, "num_stages": 1}
    return {"TILE_Q": 32, "num_warps": 8 if padded == 256 else 4, "num_stages": 2}


def backward_main(
    problem: Problem,
    chunk: Chunk,
    plan: Plan,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq_partial: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dkv_pieces: torch.Tensor,
    accumulate: bool,
) -> None:
    """Fill dq_partial where forward_main filled o_partial; write dk and dv of whole cells and the pieces of cut ones.

    Args:
        problem: the call.
        chunk: the KV heads and query tokens to do.
        plan: of this chunk.
        dout: [total_q, num_heads, head_dim], input dtype.
        lse: [num_heads, total_q], fp32, natural log.
        delta: [num_heads, total_q], fp32.
        dq_partial: [num_heads, num_queries, topk, subs, group_size, head_dim], input dtype.
        dk, dv: [total_k, KV heads of the chunk, head_dim], input dtype or fp32; rows of keys that nobody selects are
            left alone.
        dkv_pieces: [max_pieces, subs, 2, tile_k, head_dim], fp32.
        accumulate: add to dk and dv instead of writing them.
    """
    subs = dq_partial.shape[3]
    padded = padded_dim(problem.head_dim)
    backward_main_kernel[(plan.work_items.shape[0] * subs,)](
        problem.q,
        problem.k,
        problem.v,
        dout,
        lse,
        delta,
        plan.csr_offsets,
        plan.csr_edges,
        plan.work_items,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        dq_partial,
        dk,
        dv,
        dkv_pieces,
        *problem.q.stride()[:2],
        *problem.k.stride()[:2],
        *problem.v.stride()[:2],
        *dout.stride()[:2],
        *dk.stride()[:2],
        *dv.stride()[:2],
        total_q=problem.total_q,
        total_k=problem.total_k,
        topk=problem.topk,
        num_blocks=problem.num_blocks,
        head_begin=chunk.head_begin,
        query_begin=chunk.query_begin,
        edges_per_head=chunk.num_queries * problem.topk,
        edges_per_item=plan.edges_per_item,
        softmax_scale=problem.softmax_scale,
        softmax_scale_log2=problem.softmax_scale * LOG2_E.value,
        ACCUMULATE=accumulate,
        CAUSAL=problem.causal,
        BLOCK_SIZE=problem.block_size,
        GROUP_SIZE=problem.group_size,
        HEAD_DIM=problem.head_dim,
        PADDED_DIM=padded,
        TILE_K=problem.block_size // subs,
        **row_tile(problem.q.dtype, padded),
    )
