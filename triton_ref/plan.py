"""plan: invert topk_idx. Which edges (query token, slot) does each cell (KV head, query range, KV block) serve?

Every edge gets the number of its cell; a stable sort by that number brings the edges of a cell together, in ascending
query order, and leaves the unused slots at the end. A range is a run of queries; there are several where the query rows
of a head would not stay in L2, and whoever walks the cells in order stays in one for long. The lists are then cut into
work items of `edges_per_item` edges: popular cells become many items, and a rest of fewer than `min_rest` is part of
the last one. Prefix sums say where a cell's items stand, so nothing depends on the order in which programs run, and the
host never learns how many there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.problem import Chunk, ChunkGrid, Plan, Problem
from triton_ref.common import (
    SIZES,
    first_block,
    last_visible_key,
    sequence_bounds,
    sequence_of_edge,
    sequence_of_query,
    slot_attends,
)

TILE_EDGES = 1024  # edges that a program of edge_cells classifies
TILE_ITEMS = 32  # work items that a program of work_items writes at a time


@triton.jit(do_not_specialize=SIZES)
def edge_cells_kernel(
    cells,  # [num_heads, edges_per_head], int32: cell of each edge, num_cells if it attends to nothing
    topk_idx,  # [num_kv_heads, total_q, topk], int32
    cu_seqlens_q,  # [batch + 1], int32
    cu_seqlens_k,  # [batch + 1], int32
    batch,
    total_q,
    total_k,
    topk,
    num_blocks,
    num_cells,
    num_ranges,
    range_queries,  # query tokens of a range
    head_begin,
    query_begin,
    edges_per_head,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE_EDGES: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    edge = tl.program_id(0) * TILE_EDGES + tl.arange(0, TILE_EDGES)
    exists = edge < edges_per_head
    query = tl.minimum(query_begin + edge // topk, total_q - 1)
    first_slot = ((head_begin + head) * total_q + query_begin) * topk
    block_id = tl.load(topk_idx + first_slot + edge, mask=exists, other=-1)

    sequence = sequence_of_query(query, cu_seqlens_q, batch)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens_q, total_q)
    k_begin, k_len = sequence_bounds(sequence, cu_seqlens_k, total_k)
    last_key = last_visible_key(query, q_begin, q_len, k_len, CAUSAL)

    head_and_range = head * num_ranges + edge // topk // range_queries
    cell = head_and_range * num_blocks + first_block(k_begin, sequence, BLOCK_SIZE) + block_id
    attends = slot_attends(block_id, 0, last_key, BLOCK_SIZE)
    tl.store(cells + head * edges_per_head + edge, tl.where(attends, cell, num_cells), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def work_items_kernel(
    work_items,  # [max_items, 4], int32: (head and block, edge_begin, edge_end, sequence), filled with -1
    csr_offsets,  # [num_cells + 1], int32
    csr_edges,  # [num_heads * edges_per_head], int32
    item_ends,  # [num_cells], int32: items of a cell and of those before it
    cu_seqlens_q,  # [batch + 1], int32
    batch,
    topk,
    num_blocks,
    num_ranges,
    query_begin,
    edges_per_item,
    min_rest,
    TILE_ITEMS: tl.constexpr,
):
    cell = tl.program_id(0)
    begin = tl.load(csr_offsets + cell)
    end = tl.load(csr_offsets + cell + 1)
    if begin == end:
        return
    sequence = sequence_of_edge(tl.load(csr_edges + begin), topk, query_begin, cu_seqlens_q, batch)

    head_and_block = cell // (num_ranges * num_blocks) * num_blocks + cell % num_blocks

    num_items = tl.maximum((end - begin + edges_per_item - min_rest) // edges_per_item, 1)
    first_row = tl.load(item_ends + cell) - num_items
    for first_item in range(0, num_items, TILE_ITEMS):
        item = first_item + tl.arange(0, TILE_ITEMS)
        edge_begin = begin + item * edges_per_item
        row = work_items + (first_row + item).to(tl.int64) * 4
        exists = item < num_items
        tl.store(row, head_and_block, mask=exists)
        tl.store(row + 1, edge_begin, mask=exists)
        tl.store(row + 2, tl.where(item + 1 < num_items, edge_begin + edges_per_item, end), mask=exists)
        tl.store(row + 3, sequence, mask=exists)


def plan(problem: Problem, grid: ChunkGrid, edges_per_item: int, num_ranges: int = 1, min_rest: int = 1) -> list[Plan]:
    """Sort each chunk's edges by cell and cut them into work items; the results are described by `fsa.problem.Plan`."""
    return [_plan_chunk(problem, chunk, edges_per_item, num_ranges, min_rest) for chunk in grid.chunks]


def _plan_chunk(problem: Problem, chunk: Chunk, edges_per_item: int, num_ranges: int, min_rest: int) -> Plan:
    num_cells = chunk.num_heads * num_ranges * problem.num_blocks
    edges_per_head = chunk.num_queries * problem.topk
    num_edges = chunk.num_heads * edges_per_head

    cells = problem.topk_idx.new_empty(num_edges)
    work_items = problem.topk_idx.new_full((num_edges // edges_per_item + num_cells, 4), -1)
    edge_cells_kernel[(triton.cdiv(edges_per_head, TILE_EDGES), chunk.num_heads)](
        cells,
        problem.topk_idx,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        batch=problem.batch,
        total_q=problem.total_q,
        total_k=problem.total_k,
        topk=problem.topk,
        num_blocks=problem.num_blocks,
        num_cells=num_cells,
        num_ranges=num_ranges,
        range_queries=triton.cdiv(chunk.num_queries, num_ranges),
        head_begin=chunk.head_begin,
        query_begin=chunk.query_begin,
        edges_per_head=edges_per_head,
        BLOCK_SIZE=problem.block_size,
        CAUSAL=problem.causal,
        TILE_EDGES=TILE_EDGES,
    )
    sorted_cells, order = torch.sort(cells, stable=True)
    csr_edges = order.remainder_(edges_per_head).int()
    cell_numbers = torch.arange(num_cells + 1, dtype=torch.int32, device=cells.device)
    csr_offsets = torch.searchsorted(sorted_cells, cell_numbers, out_int32=True)
    cell_edges = csr_offsets.diff()
    items = torch.maximum((cell_edges + edges_per_item - min_rest) // edges_per_item, cell_edges.clamp(max=1))
    work_items_kernel[(num_cells,)](
        work_items,
        csr_offsets,
        csr_edges,
        items.cumsum(0, dtype=torch.int32),
        problem.cu_seqlens_q,
        batch=problem.batch,
        topk=problem.topk,
        num_blocks=problem.num_blocks,
        num_ranges=num_ranges,
        query_begin=chunk.query_begin,
        edges_per_item=edges_per_item,
        min_rest=min_rest,
        TILE_ITEMS=TILE_ITEMS,
        num_warps=1,
    )
    next_item = problem.topk_idx.new_zeros(1)
    return Plan(csr_offsets, csr_edges, work_items, next_item, edges_per_item)
