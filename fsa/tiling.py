"""Tile and work-item sizes: pure functions of the shape, shared by the planner and by every backend."""

from __future__ import annotations

import functools

import torch

# Without a GPU (the interpreter) the number only sets how finely work is cut.
_CPU_NUM_SMS = 8


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


def forward_edges_per_item(group_size: int) -> int:
    """Edges of a forward work item: about 1024 query rows, so that loading K and V is a small part of an item."""
    return max(64, round_up(ceil_div(1024, group_size), 64))


def backward_edges_per_item(num_edges: int, num_sms: int, max_pieces: int | None = None) -> int:
    """Edges of a backward work item, for at most `num_edges` edges.

    Aims at eight items an SM: fewer would leave SMs idle at the end, more would cut blocks that need no cutting, and
    each cut costs one fp32 piece of dK and dV. `max_pieces` bounds the pieces (`2 * num_edges // edges_per_item + 1`).
    """
    edges = ceil_div(num_edges, 8 * num_sms)
    if max_pieces is not None:
        edges = max(edges, ceil_div(2 * num_edges, max(1, max_pieces - 1)))
    return max(64, round_up(edges, 64))


def plan_parts(num_heads: int, num_queries: int) -> int:
    """Parts into which the plan cuts the queries of a head, to count and fill them in parallel.

    Enough parts for two CTAs on each of 132 SMs; a part has at least 64 queries.
    """
    return max(1, min(ceil_div(num_queries, 64), ceil_div(264, num_heads)))


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; a small constant for the CPU."""
    if device.type != "cuda":
        return _CPU_NUM_SMS
    return _cuda_num_sms(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_num_sms(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
