"""The planner of chunks: cuts a call into chunks that keep its buffers under the workspace limit.

Pure arithmetic on shapes.

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

from .buffers import Pass, Sizes, chunk_bytes, planned_bytes, query_ranges
from .problem import ChunkGrid
from .tiling import ceil_div, round_up

_INT32_END = 1 << 31
# Plans of several chunks are made together, since one chunk alone leaves SMs without work: as many as take, beside the
# first, limit / _PLANS_SHARE bytes at most, which chunks leave free where that does not cut queries more finely.
_PLANS_SHARE = 16
# Queries of a chunk come in multiples of this where possible: plan parts and backward items are cut at 64 as well.
_QUERY_STEP = 64


@functools.lru_cache(maxsize=1024)
def may_share_blocks(sizes: Sizes, limit: int) -> bool:
    """Whether the limit has room to share blocks: for scattered_idx, which a call has whole, and a whole query tile."""
    sharing = dataclasses.replace(sizes, shares_blocks=True)
    one_tile = min(_QUERY_STEP, sizes.total_q)
    return sizes.scattered_bytes <= limit // 4 and _fits(
        sharing, "forward", 1, one_tile, limit, limit - sizes.scattered_bytes
    )


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
    """Whether so many queries give a block, on average, half the edges of a forward work item of the largest size.

    Fewer queries load every K and V for less, of which each chunk loads all. Many keys a query make such chunks.
    """
    return 2 * num_queries * sizes.topk >= sizes.num_blocks * sizes.max_forward_edges_per_item


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
    num_edges = num_heads * num_queries * sizes.topk
    num_ranges = query_ranges(sizes, which, num_queries)
    largest = max(
        2 * num_edges,  # 2 * csr_offsets numbers the pieces
        num_edges * sizes.subs(which) * sizes.group_size,  # rows of partials
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
