"""Tile and work-item sizes: pure functions of the shape, shared by the planner and by every backend."""

from __future__ import annotations

import functools

import torch

# Without a GPU (the interpreter) the number only sets how finely work is cut.
_CPU_NUM_SMS = 8

# The L2 of an H100 has 50 MB in two halves, and an SM finds in its own half what it reads often: about 25 MB, of which
# the partials on their way to memory need some.
_QUERY_BYTES_IN_L2 = 16 << 20


_QUERY_TILE = 64  # kQueryTile of csrc/params.h: neighbouring queries that share blocks
# kRows of csrc/forward/shared_sm90_traits.h: of a unit, up to head_dim 128.
_SHARED_ROWS = 128


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `a`."""
    return ceil_div(a, multiple) * multiple


def forward_tile_k(head_dim: int, block_size: int) -> int:
    """Keys of a sub-block in the forward: K and V of a sub-block lie in shared memory together."""
    return min(block_size, 128 if head_dim <= 128 else 64)


def backward_tile_k(head_dim: int, block_size: int) -> int:
    """Keys of a sub-block in the backward: their dK and dV stay in registers, K and V in shared memory."""
    return min(block_size, 64 if head_dim <= 192 else 32)


def max_forward_edges_per_item(group_size: int, tile_k: int) -> int:
    """edges_per_item of the forward where there are many edges: about 16 query rows a key, and 64 edges at least.

    Longer items leave SMs idle at the end, shorter ones load K and V more often. On an H200 half as many rows take 2 to
    5 % longer up to group 4, with blocks of 64 and of 128.
    """
    return round_up(ceil_div(16 * tile_k, group_size), 64)


def forward_edges_per_item(largest: int, num_edges: int, num_sms: int) -> int:
    """Edges of a forward work item, for at most `num_edges` edges of a chunk; `largest`: max_forward_edges_per_item.

    Where that makes fewer than 16 items an SM they are shorter, down to a quarter, 64 at least. (On an H200 main takes
    a seventh less for 8,192 tokens of 4 heads in groups of one, a quarter less for 2,048.)
    """
    return round_up(min(largest, max(ceil_div(largest, 4), num_edges // (16 * num_sms))), 64)


def forward_min_rest(edges_per_item: int) -> int:
    """Edges from which on what is left of a cell is a forward work item of its own, not part of the last one.

    Shorter ones are not worth loading K and V for: on an H200 main takes 1 % less at group 1 and 4 % at groups 2 and 4
    than when each rest is one.
    """
    return edges_per_item // 2


def backward_edges_per_item(num_edges: int, num_heads: int, num_sms: int, max_pieces: int | None = None) -> int:
    """Edges of a backward work item, for at most `num_edges` edges of a chunk of `num_heads` KV heads.

    Aims at eight items an SM, four for a single head: fewer would leave SMs idle at the end, more would cut blocks that
    need no cutting, of which a single head has few, and each cut costs one fp32 piece of dK and dV. (Four instead of
    eight: 5 % less time on an H100.) `max_pieces` bounds the pieces (`2 * num_edges // edges_per_item + 1`).
    """
    edges = ceil_div(num_edges, min(8, 4 * num_heads) * num_sms)
    if max_pieces is not None:
        edges = max(edges, ceil_div(2 * num_edges, max(1, max_pieces - 1)))
    return max(64, round_up(edges, 64))


def forward_query_ranges(num_queries: int, row_bytes: int, topk: int, num_blocks: int, edges_per_item: int) -> int:
    """Ranges into which the forward cuts the queries of a chunk; its work items go through them one by one.

    Items of all blocks gather query rows (`row_bytes` a token: of one KV head's group) from all over a range, again and
    again, and should find them in L2. More ranges make smaller cells: their edges stay half an item on average.
    `edges_per_item`: max_forward_edges_per_item.
    """
    queries_in_l2 = max(1, _QUERY_BYTES_IN_L2 // row_bytes)
    most = 2 * num_queries * topk // (num_blocks * edges_per_item)
    return max(1, min(ceil_div(num_queries, queries_in_l2), most))


def query_tiles(num_queries: int) -> int:
    """Query tiles of a chunk."""
    return ceil_div(num_queries, _QUERY_TILE)


def sharing_run(group_size: int, block_size: int) -> tuple[int, int]:
    """Queries of a run, which decides which blocks its queries share, and how many of these must select a block.

    A run is as short as whole units of the shared stage allow (those up to head_dim 128): a unit multiplies all its
    rows with each of its blocks.
    Three eighths of a run must agree, and half of it on longer blocks, for which main has longer tiles and shared has
    not. On an H200 a quarter takes 1 % more at group 4, 5 % at group 16 and a fifth with blocks of 128.
    """
    run = next((queries for queries in (8, 16, 32) if queries * group_size % _SHARED_ROWS == 0), _QUERY_TILE)
    return run, 3 * run // 8 if block_size == 64 else run // 2


def max_shared_blocks(group_size: int, block_size: int, topk: int) -> int:
    """Blocks that a query tile can share."""
    return _QUERY_TILE * topk // sharing_run(group_size, block_size)[1]


def plan_parts(num_heads: int, num_queries: int, num_ranges: int) -> int:
    """Parts into which the plan cuts the queries of a range, to count and fill them in parallel, for all heads at once.

    As many parts as make two CTAs on each of 132 SMs, which run at once; a part has at least 64 queries where possible.
    """
    return max(1, min(ceil_div(num_queries, 64 * num_ranges), 264 // (num_heads * num_ranges)))


def plan_scratch(num_heads: int, num_ranges: int, parts: int, num_blocks: int) -> int:
    """Numbers that making a plan needs for a moment: edges of each (cell, part) and cell; edges, items of 32 cells."""
    return num_heads * num_ranges * (num_blocks * (parts + 1) + 2 * ceil_div(num_blocks, 32))


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; a small constant for the CPU."""
    if device.type != "cuda":
        return _CPU_NUM_SMS
    return _cuda_num_sms(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_num_sms(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
