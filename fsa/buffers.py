"""The buffers of a call: the shape of each, the bytes of a chunk, and views into what several chunks have together.

Pure arithmetic on shapes, but for what allocates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .problem import Problem
from .tiling import (
    backward_edges_per_item,
    backward_tile_k,
    forward_edges_per_item,
    forward_query_ranges,
    forward_tile_k,
    max_forward_edges_per_item,
    max_shared_blocks,
    num_sms,
    plan_parts,
    plan_scratch,
    query_tiles,
)

Pass = Literal["forward", "backward"]


@dataclass(frozen=True)
class Buffer:
    """Shape and dtype of one workspace tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return self.dtype.itemsize * math.prod(self.shape)

    def empty(self, device: torch.device) -> torch.Tensor:
        """Allocates the tensor, uninitialised."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


Buffers = Mapping[str, Buffer]


@dataclass(frozen=True)
class Sizes:
    """What buffer sizes depend on."""

    total_q: int
    total_k: int
    num_blocks: int  # Problem.num_blocks
    num_kv_heads: int
    group_size: int
    head_dim: int
    topk: int
    block_size: int
    dtype: torch.dtype  # of q, k and v
    num_sms: int
    shares_blocks: bool = False  # the forward has the stages split and shared

    @classmethod
    def of(cls, problem: Problem, shares_blocks: bool = False) -> Sizes:
        """The sizes of a problem on its device."""
        return cls(
            total_q=problem.total_q,
            total_k=problem.total_k,
            num_blocks=problem.num_blocks,
            num_kv_heads=problem.num_kv_heads,
            group_size=problem.group_size,
            head_dim=problem.head_dim,
            topk=problem.topk,
            block_size=problem.block_size,
            dtype=problem.q.dtype,
            num_sms=num_sms(problem.q.device),
            shares_blocks=shares_blocks,
        )

    def subs(self, which: Pass) -> int:
        """Sub-blocks of a block."""
        tile_k = forward_tile_k if which == "forward" else backward_tile_k
        return self.block_size // tile_k(self.head_dim, self.block_size)

    @property
    def max_forward_edges_per_item(self) -> int:
        """edges_per_item of the forward where there are many."""
        return max_forward_edges_per_item(self.group_size, self.block_size // self.subs("forward"))

    @property
    def accumulator_bytes(self) -> int:
        """dk and dv of one KV head in fp32."""
        return 2 * 4 * self.total_k * self.head_dim

    @property
    def scattered_bytes(self) -> int:
        """scattered_idx of the whole problem: [num_kv_heads, total_q, topk] int32."""
        return 4 * self.num_kv_heads * self.total_q * self.topk

    @property
    def delta_bytes(self) -> int:
        """delta of the whole problem: [num_heads, total_q] fp32."""
        return 4 * self.num_kv_heads * self.group_size * self.total_q


def edges_per_item(sizes: Sizes, which: Pass, num_heads: int, num_queries: int, limit: int) -> int:
    """Edges of a work item in a chunk of `num_heads` KV heads and `num_queries` tokens.

    In the backward, pieces of dK and dV are kept to a quarter of the limit by making the items longer.
    """
    num_edges = num_heads * num_queries * sizes.topk
    if which == "forward":
        return forward_edges_per_item(sizes.max_forward_edges_per_item, num_edges, sizes.num_sms)
    piece_bytes = 2 * 4 * sizes.block_size * sizes.head_dim
    return backward_edges_per_item(num_edges, num_heads, sizes.num_sms, max_pieces=limit // 4 // piece_bytes)


def query_ranges(sizes: Sizes, which: Pass, num_queries: int) -> int:
    """Query ranges of a chunk's plan: in the backward one, for its pieces are numbered by (KV head, KV block)."""
    if which == "backward":
        return 1
    return forward_query_ranges(
        num_queries,
        sizes.group_size * sizes.head_dim * sizes.dtype.itemsize,
        sizes.topk,
        sizes.num_blocks,
        sizes.max_forward_edges_per_item,
    )


def _plan_buffers(
    num_heads: int, num_queries: int, topk: int, num_blocks: int, edges_per_item: int, num_ranges: int
) -> Buffers:
    """The tensors of a `Plan`."""
    num_edges = num_heads * num_queries * topk
    num_cells = num_heads * num_ranges * num_blocks
    return {
        "csr_offsets": Buffer((num_cells + 1,), torch.int32),
        "csr_edges": Buffer((num_edges,), torch.int32),
        "work_items": Buffer((num_edges // edges_per_item + num_cells, 4), torch.int32),
        "next_item": Buffer((1,), torch.int32),
    }


def plan_scratch_bytes(num_heads: int, num_queries: int, num_blocks: int, num_ranges: int) -> int:
    """Bytes that making a plan needs for a moment."""
    return 4 * plan_scratch(num_heads, num_ranges, plan_parts(num_heads, num_queries, num_ranges), num_blocks)


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of o_partial: fp16 carries more bits than bf16 at the same bytes, and value_exponent gives the range."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def _forward_buffers(sizes: Sizes, num_heads: int, num_queries: int) -> Buffers:
    """What the forward main stage hands to the last one, reduce or shared."""
    subs = sizes.subs("forward")
    rows = (num_heads, num_queries, sizes.topk, subs, sizes.group_size)
    return {
        "o_partial": Buffer((*rows, sizes.head_dim), partial_dtype(sizes.dtype)),
        "lse_partial": Buffer(rows, torch.float32),
        "value_exponent": Buffer((num_heads, sizes.num_blocks, subs), torch.int32),
    }


def _shared_buffers(sizes: Sizes, num_heads: int, num_queries: int) -> Buffers:
    """What split hands to shared."""
    tiles = query_tiles(num_queries)
    return {
        "shared_blocks": Buffer(
            (num_heads, tiles, max_shared_blocks(sizes.group_size, sizes.block_size, sizes.topk), 4), torch.int32
        ),
        "shared_counts": Buffer((num_heads, tiles), torch.int32),
        "scattered_counts": Buffer((num_heads, num_queries), torch.int32),
        "shared_next": Buffer((1,), torch.int32),
    }


def _backward_buffers(sizes: Sizes, num_heads: int, num_queries: int, edges_per_item: int) -> Buffers:
    """What the backward main stage hands to the reduce stage."""
    subs = sizes.subs("backward")
    max_pieces = 2 * num_heads * num_queries * sizes.topk // edges_per_item + 1
    return {
        "dq_partial": Buffer((num_heads, num_queries, sizes.topk, subs, sizes.group_size, sizes.head_dim), sizes.dtype),
        "dkv_pieces": Buffer((max_pieces, subs, 2, sizes.block_size // subs, sizes.head_dim), torch.float32),
    }


# Remembered, so not to be changed. The planner of chunks, which tries many sizes, asks the functions themselves.
plan_buffers = functools.lru_cache(maxsize=1024)(_plan_buffers)
forward_buffers = functools.lru_cache(maxsize=1024)(_forward_buffers)
shared_buffers = functools.lru_cache(maxsize=1024)(_shared_buffers)
backward_buffers = functools.lru_cache(maxsize=1024)(_backward_buffers)


def by_chunk(together: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Each chunk's view, of the shape given, into a tensor [num_chunks, *shape of the first chunk, the largest]."""
    return [
        part if shape == shapes[0] else part.view(-1).narrow(0, 0, math.prod(shape)).view(shape)
        for part, shape in zip(together.unbind(), shapes, strict=True)
    ]


def allocate_together(
    of_chunks: Sequence[Buffers], device: torch.device
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Buffers of several chunks, the largest first: tensors with a dimension of chunks in front, and views by chunk."""
    shapes = {name: [buffers[name].shape for buffers in of_chunks] for name in of_chunks[0]}
    together = {
        name: torch.empty((len(of_chunks), *buffer.shape), dtype=buffer.dtype, device=device)
        for name, buffer in of_chunks[0].items()
    }
    views = [by_chunk(tensor, shapes[name]) for name, tensor in together.items()]
    return together, [dict(zip(together, of_chunk, strict=True)) for of_chunk in zip(*views, strict=True)]


def planned_bytes(sizes: Sizes, which: Pass, num_heads: int, num_queries: int, limit: int) -> int:
    """Bytes of what is made of a chunk's selection, before and by plan."""
    per_item = edges_per_item(sizes, which, num_heads, num_queries, limit)
    num_ranges = query_ranges(sizes, which, num_queries)
    size = plan_scratch_bytes(num_heads, num_queries, sizes.num_blocks, num_ranges)
    size += _bytes_of(_plan_buffers(num_heads, num_queries, sizes.topk, sizes.num_blocks, per_item, num_ranges))
    if which == "forward" and sizes.shares_blocks:
        size += _bytes_of(_shared_buffers(sizes, num_heads, num_queries))
    return size


def chunk_bytes(sizes: Sizes, which: Pass, num_heads: int, num_queries: int, limit: int) -> int:
    """Bytes that a chunk of `num_heads` KV heads and `num_queries` tokens allocates (delta, accumulators: apart)."""
    if which == "forward":
        buffers = _forward_buffers(sizes, num_heads, num_queries)
    else:
        per_item = edges_per_item(sizes, which, num_heads, num_queries, limit)
        buffers = _backward_buffers(sizes, num_heads, num_queries, per_item)
    return planned_bytes(sizes, which, num_heads, num_queries, limit) + _bytes_of(buffers)


def _bytes_of(buffers: Buffers) -> int:
    return sum(buffer.bytes for buffer in buffers.values())
