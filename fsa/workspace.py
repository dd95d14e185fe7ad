"""The workspace: its limit, the shape of every buffer, and the chunks that keep the sum under the limit.

Everything here is pure arithmetic on shapes; nothing reads a tensor.

The bound. Besides outputs, a call allocates at most

    max(limit, delta + accumulators of one KV head + limit / 4)

bytes. `delta` (num_heads * total_q fp32) and the accumulators (dk and dv in fp32, 8 * total_k * head_dim bytes a KV
head, needed only when the queries are cut) belong to the backward alone. The second term wins only for sequences so
long that these two leave less than a quarter of the limit for the chunks. A forward that shares blocks
(csrc/README.md) has a copy of topk_idx among its bytes, and does without where that took more than a quarter of the
limit. Copies of inputs that the kernels cannot read in place (last dimension strided, or not aligned to 16 bytes)
come on top.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .problem import ChunkGrid, Problem
from .tiling import (
    backward_edges_per_item,
    backward_tile_k,
    ceil_div,
    forward_edges_per_item,
    forward_query_ranges,
    forward_tile_k,
    max_shared_blocks,
    num_sms,
    plan_parts,
    plan_scratch,
    query_tiles,
    round_up,
)

Pass = Literal["forward", "backward"]

_DEFAULT_LIMIT = 1 << 30
_INT32_END = 1 << 31
# Plans of several chunks are made together, since one chunk alone leaves SMs without work: as many as take, beside the
# first, limit / _PLANS_SHARE bytes at most, which chunks leave free where that does not cut queries more finely.
_PLANS_SHARE = 16
# Queries of a chunk come in multiples of this where possible: plan parts and backward items are cut at 64 as well.
_QUERY_STEP = 64


# ---------------------------------------------------------------------------------------------------------------------
# The limit
# ---------------------------------------------------------------------------------------------------------------------
def _limit_from_environment() -> int:
    text = os.environ.get("FSA_WORKSPACE_LIMIT_MIB")
    if text is None:
        return _DEFAULT_LIMIT
    if not text.strip().isdecimal() or int(text) == 0:
        raise ValueError(
            f"FSA_WORKSPACE_LIMIT_MIB must be a positive whole number of MiB, got {text!r}; unset it or set e.g. 1024"
        )
    return int(text) << 20


_limit = _limit_from_environment()  # one int: reading and rebinding it is atomic, so threads need no lock


def get_workspace_limit() -> int:
    """Bytes that a call may allocate beyond its outputs (default 1 GiB, or FSA_WORKSPACE_LIMIT_MIB at import)."""
    return _limit


def set_workspace_limit(limit: int) -> None:
    """Sets the bytes that a call may allocate beyond its outputs, for all threads and devices of the process.

    A smaller limit cuts a call into more chunks, which costs time but changes no more than rounding: of dk and dv, and,
    where blocks are shared (csrc/README.md), of out and lse.
    CUDA and Triton only: the reference backend bounds its own chunks.

    Raises:
        TypeError: limit is not an int.
        ValueError: limit is not positive.
    """
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit must be an int (bytes), got {type(limit).__name__}; pass e.g. 512 * 2**20")
    if limit <= 0:
        raise ValueError(f"limit must be positive (bytes), got {limit}; pass e.g. 512 * 2**20")
    global _limit
    _limit = limit


# ---------------------------------------------------------------------------------------------------------------------
# Buffers
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Buffer:
    """Shape and dtype of one workspace tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size

    def empty(self, device: torch.device) -> torch.Tensor:
        """Allocates the tensor, uninitialised."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


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
    if which == "forward":
        return _forward_edges_per_item(sizes)
    piece_bytes = 2 * 4 * sizes.block_size * sizes.head_dim
    num_edges = num_heads * num_queries * sizes.topk
    return backward_edges_per_item(num_edges, num_heads, sizes.num_sms, max_pieces=limit // 4 // piece_bytes)


def _forward_edges_per_item(sizes: Sizes) -> int:
    return forward_edges_per_item(sizes.group_size, forward_tile_k(sizes.head_dim, sizes.block_size))


def query_ranges(sizes: Sizes, which: Pass, num_queries: int) -> int:
    """Query ranges of a chunk's plan: in the backward one, for its pieces are numbered by (KV head, KV block)."""
    if which == "backward":
        return 1
    return forward_query_ranges(
        num_queries,
        sizes.group_size * sizes.head_dim * sizes.dtype.itemsize,
        sizes.topk,
        sizes.num_blocks,
        _forward_edges_per_item(sizes),
    )


Buffers = Mapping[str, Buffer]


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
    tile_k = forward_tile_k(sizes.head_dim, sizes.block_size)
    subs = sizes.block_size // tile_k
    rows = (num_heads, num_queries, sizes.topk, subs, sizes.group_size)
    return {
        "o_partial": Buffer((*rows, sizes.head_dim), partial_dtype(sizes.dtype)),
        "lse_partial": Buffer(rows, torch.float32),
        "value_exponent": Buffer((num_heads, sizes.num_blocks, subs), torch.int32),
    }


@functools.lru_cache(maxsize=1024)
def may_share_blocks(sizes: Sizes, limit: int) -> bool:
    """Whether the limit has room to share blocks: for scattered_idx, which a call has whole, and a whole query tile."""
    sharing = dataclasses.replace(sizes, shares_blocks=True)
    one_tile = min(_QUERY_STEP, sizes.total_q)
    return sizes.scattered_bytes <= limit // 4 and _fits(
        sharing, "forward", 1, one_tile, limit, limit - sizes.scattered_bytes
    )


def _shared_buffers(sizes: Sizes, num_heads: int, num_queries: int, num_chunks: int = 1) -> Buffers:
    """What split hands to shared; of chunks one after the other."""
    num_heads *= num_chunks
    tiles = query_tiles(num_queries)
    return {
        "shared_blocks": Buffer(
            (num_heads, tiles, max_shared_blocks(sizes.group_size, sizes.block_size, sizes.topk), 4), torch.int32
        ),
        "shared_counts": Buffer((num_heads, tiles), torch.int32),
        "scattered_counts": Buffer((num_heads, num_queries), torch.int32),
        "shared_next": Buffer((num_chunks,), torch.int32),
    }


def _backward_buffers(sizes: Sizes, num_heads: int, num_queries: int, edges_per_item: int) -> Buffers:
    """What the backward main stage hands to the reduce stage."""
    tile_k = backward_tile_k(sizes.head_dim, sizes.block_size)
    subs = sizes.block_size // tile_k
    max_pieces = 2 * num_heads * num_queries * sizes.topk // edges_per_item + 1
    return {
        "dq_partial": Buffer((num_heads, num_queries, sizes.topk, subs, sizes.group_size, sizes.head_dim), sizes.dtype),
        "dkv_pieces": Buffer((max_pieces, subs, 2, tile_k, sizes.head_dim), torch.float32),
    }


# Remembered, so not to be changed. The planner of chunks, which tries many sizes, asks the functions themselves.
plan_buffers = functools.lru_cache(maxsize=1024)(_plan_buffers)
forward_buffers = functools.lru_cache(maxsize=1024)(_forward_buffers)
shared_buffers = functools.lru_cache(maxsize=1024)(_shared_buffers)
backward_buffers = functools.lru_cache(maxsize=1024)(_backward_buffers)


def by_chunk(together: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views into a tensor of equal parts, one a chunk, each as large as the first needs: of the shapes given."""
    parts = together.view(len(shapes), *shapes[0]).unbind()
    return [
        part if shape == shapes[0] else part.view(-1).narrow(0, 0, math.prod(shape)).view(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


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


# ---------------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1024)
def chunk_grids(sizes: Sizes, which: Pass, limit: int) -> tuple[ChunkGrid, ...]:
    """Chunks that cover all (KV head, query token) pairs once, heads outside, within the bound of this module.

    All in one chunk if that fits. Else whole heads, if one KV head with all queries fits. Else the queries are cut: of
    all heads together in the forward, where that is done also if it makes fewer chunks, of enough queries for their
    work items; of one head at a time in the backward, where every cut adds to the accumulators of its heads once more.
    Those of a grid have the same heads, or all queries.

    Raises:
        RuntimeError: not even one query of one KV head fits; says the limit that it takes.
    """
    heads, queries = cut(sizes, which, limit)
    together = chunks_together(sizes, which, heads, queries, limit)
    cuts_queries = queries < sizes.total_q
    head_step, query_step = (heads, together * queries) if cuts_queries else (together * heads, queries)
    return tuple(
        ChunkGrid(
            head,
            min(head + head_step, sizes.num_kv_heads),
            query,
            min(query + query_step, sizes.total_q),
            heads,
            queries,
        )
        for head in range(0, sizes.num_kv_heads, head_step)
        for query in range(0, sizes.total_q, query_step)
    )


def cut(sizes: Sizes, which: Pass, limit: int) -> tuple[int, int]:
    """How many KV heads and how many queries a chunk has."""
    all_heads, all_queries = sizes.num_kv_heads, sizes.total_q
    if _fits(sizes, which, all_heads, all_queries, limit, _budget(sizes, which, limit, cuts_queries=False)):
        return all_heads, all_queries
    heads = _whole_heads(sizes, which, limit)
    if heads is None:
        return _cut_queries(sizes, which, limit)
    if which == "backward":
        return heads, all_queries
    some_heads, queries = _cut_queries(sizes, which, limit)
    fewer = ceil_div(all_heads, some_heads) * ceil_div(all_queries, queries) < ceil_div(all_heads, heads)
    return (some_heads, queries) if fewer and _fill_items(sizes, queries) else (heads, all_queries)


def _fill_items(sizes: Sizes, num_queries: int) -> bool:
    """Whether the edges of a block from so many queries are half a forward work item on average.

    Fewer queries load every K and V for less, of which each chunk loads all. Many keys a query make such chunks.
    """
    return 2 * num_queries * sizes.topk >= sizes.num_blocks * _forward_edges_per_item(sizes)


def _whole_heads(sizes: Sizes, which: Pass, limit: int) -> int | None:
    """How many KV heads a chunk of all queries has; None if not even one fits."""
    budget = _budget(sizes, which, limit, cuts_queries=False)
    for groups in range(2, sizes.num_kv_heads + 1):
        heads = ceil_div(sizes.num_kv_heads, groups)
        if _fits(sizes, which, heads, sizes.total_q, limit, budget - limit // _PLANS_SHARE):
            return heads
    return 1 if _fits(sizes, which, 1, sizes.total_q, limit, budget) else None


def _cut_queries(sizes: Sizes, which: Pass, limit: int) -> tuple[int, int]:
    """How many KV heads and queries a chunk of some queries has."""
    heads, few_queries = 1, min(_QUERY_STEP, sizes.total_q)
    if which == "forward":
        heads = sizes.num_kv_heads
        while heads > 1 and not _fits(sizes, which, heads, few_queries, limit, limit // 4):
            heads = ceil_div(heads, 2)
    budget, spare = _budget(sizes, which, limit, cuts_queries=True), limit // _PLANS_SHARE
    if _fits(sizes, which, heads, few_queries, limit, budget - spare):
        budget -= spare
    return heads, min(_query_step(sizes, which, heads, limit, budget), sizes.total_q)


def chunks_together(sizes: Sizes, which: Pass, chunk_heads: int, chunk_queries: int, limit: int) -> int:
    """How many chunks of `cut` are planned together."""
    cuts_queries = chunk_queries < sizes.total_q
    chunks = ceil_div(sizes.total_q, chunk_queries) if cuts_queries else ceil_div(sizes.num_kv_heads, chunk_heads)
    in_use = chunk_bytes(sizes, which, chunk_heads, chunk_queries, limit)
    spare = max(0, _budget(sizes, which, limit, cuts_queries) - in_use)
    planned = planned_bytes(sizes, which, chunk_heads, chunk_queries, limit)
    return min(chunks, 1 + min(spare, limit // _PLANS_SHARE) // planned)


def _budget(sizes: Sizes, which: Pass, limit: int, cuts_queries: bool) -> int:
    """Bytes that the chunks may take: what is left of the limit, a quarter of it where queries are cut."""
    if which == "forward":
        beside = sizes.scattered_bytes if sizes.shares_blocks else 0
    else:
        beside = sizes.delta_bytes + (sizes.accumulator_bytes if cuts_queries else 0)
    return max(limit - beside, limit // 4) if cuts_queries else limit - beside


def _fits(sizes: Sizes, which: Pass, num_heads: int, num_queries: int, limit: int, budget: int) -> bool:
    """Whether a chunk stays within `budget` bytes and int32."""
    return (
        _fits_int32(sizes, which, num_heads, num_queries)
        and chunk_bytes(sizes, which, num_heads, num_queries, limit) <= budget
    )


def _fits_int32(sizes: Sizes, which: Pass, num_heads: int, num_queries: int) -> bool:
    """Whether every index inside a chunk fits int32."""
    tile_k = (
        forward_tile_k(sizes.head_dim, sizes.block_size)
        if which == "forward"
        else backward_tile_k(sizes.head_dim, sizes.block_size)
    )
    num_edges = num_heads * num_queries * sizes.topk
    num_ranges = query_ranges(sizes, which, num_queries)
    largest = max(
        2 * num_edges,  # 2 * csr_offsets numbers the pieces
        num_edges * (sizes.block_size // tile_k) * sizes.group_size,  # rows of partials
        num_edges // 64 + num_heads * num_ranges * sizes.num_blocks,  # work items
    )
    return largest < _INT32_END


def _query_step(sizes: Sizes, which: Pass, num_heads: int, limit: int, budget: int) -> int:
    """Queries of a chunk: the fewest chunks that fit, of balanced length, a multiple of 64 tokens where possible."""

    def fits(num_queries: int) -> bool:
        return _fits(sizes, which, num_heads, num_queries, limit, budget)

    if not fits(1):
        raise RuntimeError(_too_small_message(sizes, which, limit))
    unit = _QUERY_STEP if fits(min(_QUERY_STEP, sizes.total_q)) else 1
    low, high = 1, ceil_div(sizes.total_q, unit)  # in units; low fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle - 1)

    count = ceil_div(sizes.total_q, low * unit)
    step = round_up(ceil_div(sizes.total_q, count), unit)
    # Sizes are nearly, not strictly, monotonic in the queries (item lengths are rounded): check what is returned.
    while not (fits(step) and fits(sizes.total_q % step or step)):
        step -= unit if step > unit else 1
    return step


def _too_small_message(sizes: Sizes, which: Pass, limit: int) -> str:
    one_query = chunk_bytes(sizes, which, 1, 1, limit=1 << 62)
    beside = sizes.delta_bytes + sizes.accumulator_bytes if which == "backward" else 0
    needed = min(4 * one_query, one_query + beside)  # chunks get what is left, and a quarter of the limit at least
    return (
        f"workspace limit must hold one query of one KV head, in the {which} of this call {needed} bytes, "
        f"got {limit} bytes; raise it with fsa.set_workspace_limit({needed}) or FSA_WORKSPACE_LIMIT_MIB"
    )
