"""backward_reduce: sum what backward_main left in parts.

dQ of a query is the sum of its partials over slots and sub-blocks. dK and dV of a cell that was cut into several work
items are the sums of the items' pieces. Both run in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.problem import Chunk, Plan, Problem
from triton_ref.common import (
    SIZES,
    chunk_rows,
    first_block,
    load_rows,
    padded_dim,
    partial_rows,
    reduce_tile_rows,
    sequence_bounds,
    sequence_of_edge,
    slot_attends,
    store_gradient_rows,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_dq_kernel(
    topk_idx,  # [num_kv_heads, total_q, topk], int32
    dq_partial,  # [num_heads, num_queries, topk, SUBS, GROUP_SIZE, head_dim]
    dq,  # [total_q, num_heads, head_dim]
    cu_seqlens_q,
    cu_seqlens_k,
    batch,
    total_q,
    total_k,
    topk,
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
    query, group, last_key, _, exists = chunk_rows(
        tl.program_id(0), query_begin, query_end, cu_seqlens_q, cu_seqlens_k, batch, total_q, total_k,
        CAUSAL, BLOCK_SIZE, GROUP_SIZE, TILE_ROWS,
    )  # fmt: skip
    slots = topk_idx + ((head_begin + head) * total_q + query) * topk

    dq_tile = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    for slot in range(topk):
        block_id = tl.load(slots + slot, mask=exists, other=-1)
        for sub in range(SUBS):
            attends = slot_attends(block_id, sub * (BLOCK_SIZE // SUBS), last_key, BLOCK_SIZE)
            edge = (query - query_begin) * topk + slot
            rows = partial_rows(head, (query_end - query_begin) * topk, edge, sub, group, SUBS, GROUP_SIZE)
            dq_tile += load_rows(dq_partial, rows * HEAD_DIM, attends, HEAD_DIM, PADDED_DIM)

    row = query.to(tl.int64) * (num_kv_heads * GROUP_SIZE) + (head_begin + head) * GROUP_SIZE + group
    store_rows(dq, row * HEAD_DIM, dq_tile, exists, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_dkv_kernel(
    csr_offsets,
    csr_edges,
    cu_seqlens_q,
    cu_seqlens_k,
    dkv_pieces,  # [max_pieces, SUBS, 2, TILE_K, head_dim]
    dk,  # [total_k, num_heads, head_dim]
    dv,  # [total_k, num_heads, head_dim]
    dk_token_stride,
    dk_head_stride,
    dv_token_stride,
    dv_head_stride,
    batch,
    total_k,
    topk,
    num_blocks,
    query_begin,
    edges_per_item,
    ACCUMULATE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_K: tl.constexpr,
):
    SUBS: tl.constexpr = BLOCK_SIZE // TILE_K
    cell = tl.program_id(0) // SUBS
    sub = tl.program_id(0) % SUBS
    cell_begin = tl.load(csr_offsets + cell).to(tl.int64)
    num_edges = tl.load(csr_offsets + cell + 1) - cell_begin
    if num_edges <= edges_per_item:
        return

    dk_tile = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv_tile = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    every_row = tl.arange(0, TILE_K) >= 0
    first_piece = 2 * cell_begin // edges_per_item
    for piece in range((num_edges + edges_per_item - 1) // edges_per_item):
        dk_rows = ((first_piece + piece) * SUBS + sub) * 2 * TILE_K + tl.arange(0, TILE_K)
        dk_tile += load_rows(dkv_pieces, dk_rows * HEAD_DIM, every_row, HEAD_DIM, PADDED_DIM)
        dv_tile += load_rows(dkv_pieces, (dk_rows + TILE_K) * HEAD_DIM, every_row, HEAD_DIM, PADDED_DIM)

    sequence = sequence_of_edge(tl.load(csr_edges + cell_begin), topk, query_begin, cu_seqlens_q, batch)
    k_begin, k_len = sequence_bounds(sequence, cu_seqlens_k, total_k)
    block_id = cell % num_blocks - first_block(k_begin, sequence, BLOCK_SIZE)
    keys = block_id * BLOCK_SIZE + sub * TILE_K + tl.arange(0, TILE_K)
    tokens = (k_begin + keys).to(tl.int64)
    head = (cell // num_blocks).to(tl.int64)
    dk_offsets = tokens * dk_token_stride + head * dk_head_stride
    dv_offsets = tokens * dv_token_stride + head * dv_head_stride
    store_gradient_rows(dk, dk_offsets, dk_tile, keys < k_len, ACCUMULATE, HEAD_DIM, PADDED_DIM)
    store_gradient_rows(dv, dv_offsets, dv_tile, keys < k_len, ACCUMULATE, HEAD_DIM, PADDED_DIM)


def backward_reduce(
    problem: Problem,
    chunk: Chunk,
    plan: Plan,
    dq_partial: torch.Tensor,
    dkv_pieces: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    accumulate: bool,
) -> None:
    """Write every row of the chunk in dq, and dk and dv of the cells that were cut.

    Args:
        problem: the call.
        chunk: the KV heads and query tokens to do.
        plan: of this chunk.
        dq_partial, dkv_pieces: as backward_main left them.
        dq: [total_q, num_heads, head_dim], input dtype.
        dk, dv: [total_k, KV heads of the chunk, head_dim], input dtype or fp32.
        accumulate: add to dk and dv instead of writing them.
    """
    subs, tile_k = dkv_pieces.shape[1], dkv_pieces.shape[3]
    padded = padded_dim(problem.head_dim)
    tile_rows = reduce_tile_rows(padded)
    num_rows = chunk.num_queries * problem.group_size
    backward_reduce_dq_kernel[(triton.cdiv(num_rows, tile_rows), chunk.num_heads)](
        problem.topk_idx,
        dq_partial,
        dq,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        batch=problem.batch,
        total_q=problem.total_q,
        total_k=problem.total_k,
        topk=problem.topk,
        num_kv_heads=problem.num_kv_heads,
        head_begin=chunk.head_begin,
        query_begin=chunk.query_begin,
        query_end=chunk.query_end,
        CAUSAL=problem.causal,
        BLOCK_SIZE=problem.block_size,
        SUBS=subs,
        GROUP_SIZE=problem.group_size,
        HEAD_DIM=problem.head_dim,
        PADDED_DIM=padded,
        TILE_ROWS=tile_rows,
    )
    backward_reduce_dkv_kernel[(chunk.num_heads * problem.num_blocks * subs,)](
        plan.csr_offsets,
        plan.csr_edges,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        dkv_pieces,
        dk,
        dv,
        *dk.stride()[:2],
        *dv.stride()[:2],
        batch=problem.batch,
        total_k=problem.total_k,
        topk=problem.topk,
        num_blocks=problem.num_blocks,
        query_begin=chunk.query_begin,
        edges_per_item=plan.edges_per_item,
        ACCUMULATE=accumulate,
        BLOCK_SIZE=problem.block_size,
        HEAD_DIM=problem.head_dim,
        PADDED_DIM=padded,
        TILE_K=tile_k,
        num_warps=8,
    )
