"""The planner of chunks: whatever the shapes and the limit, chunks cover everything once and keep to their caps."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fsa import buffers, tiling
from fsa.buffers import Pass, Sizes, chunk_bytes, edges_per_item, planned_bytes
from fsa.chunks import chunk_grids, cut, may_share_blocks
from fsa.problem import Chunk

PASSES: tuple[Pass, ...] = ("forward", "backward")
SMALL = Sizes(
    total_q=1000,
    total_k=1300,
    num_blocks=1300 // 128 + 3,
    num_kv_heads=4,
    group_size=3,
    head_dim=160,
    topk=5,
    block_size=128,
    dtype=torch.bfloat16,
    num_sms=132,
)


@st.composite
def problem_sizes(draw: st.DrawFn) -> Sizes:
    total_k = draw(st.integers(1, 1 << 21))
    block_size = draw(st.sampled_from([32, 64, 128, 256]))
    return Sizes(
        total_q=draw(st.integers(1, 1 << 21)),
        total_k=total_k,
        num_blocks=total_k // block_size + draw(st.integers(1, 5000)),
        num_kv_heads=draw(st.integers(1, 300)),
        group_size=draw(st.integers(1, 128)),
        head_dim=8 * draw(st.integers(1, 32)),
        topk=draw(st.integers(1, 512)),
        block_size=block_size,
        dtype=draw(st.sampled_from([torch.float16, torch.float32])),
        num_sms=draw(st.sampled_from([8, 108, 132])),
        shares_blocks=draw(st.booleans()),
    )


def sharing_as_allowed(sizes: Sizes, which: Pass, limit: int) -> Sizes:
    """The sizes with which the pipeline plans: shares_blocks only in the forward, and where the limit has room."""
    alone = dataclasses.replace(sizes, shares_blocks=False)
    shares = which == "forward" and sizes.shares_blocks and may_share_blocks(alone, limit)
    return dataclasses.replace(sizes, shares_blocks=shares)


def plan_chunks(sizes: Sizes, which: Pass, limit: int) -> list[Chunk]:
    """All chunks, in order."""
    return [chunk for grid in chunk_grids(sizes, which, limit) for chunk in grid.chunks]


def ranges(chunks: list[Chunk]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Query ranges by head range, in the order of the chunks."""
    by_heads = itertools.groupby(chunks, lambda c: (c.head_begin, c.head_end))
    return {heads: [(c.query_begin, c.query_end) for c in group] for heads, group in by_heads}


def assert_covers(pieces: list[tuple[int, int]], total: int) -> None:
    """Non-empty ranges that follow each other from 0 to total."""
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == total and all(begin < end for begin, end in pieces)


def assert_within_caps(sizes: Sizes, which: Pass, limit: int, chunk: Chunk, queries_are_cut: bool, others: int) -> None:
    """The bound that fsa/chunks.py documents, and int32 for every index inside the chunk; plans of others are there."""
    delta = sizes.delta_bytes if which == "backward" else 0
    accumulators = sizes.accumulator_bytes if which == "backward" and queries_are_cut else 0
    scattered = sizes.scattered_bytes if which == "forward" and sizes.shares_blocks else 0
    heads, queries = chunk.num_heads, chunk.num_queries
    in_use = delta + scattered + heads * accumulators + chunk_bytes(sizes, which, heads, queries, limit)
    plans_of_others = others * planned_bytes(sizes, which, heads, queries, limit)
    assert plans_of_others <= limit // 16
    in_use += plans_of_others
    assert in_use <= max(limit, delta + accumulators + limit // 4)

    if which == "forward":
        rows = buffers.forward_buffers(sizes, heads, queries)["lse_partial"].shape
    else:
        rows = buffers.backward_buffers(sizes, heads, queries, 64)["dq_partial"].shape[:-1]
    assert 2 * heads * queries * sizes.topk < 2**31
    assert math.prod(rows) < 2**31
    num_ranges = buffers.query_ranges(sizes, which, queries)
    assert buffers.plan_scratch_bytes(heads, queries, sizes.num_blocks, num_ranges) < 4 * 2**31


@settings(max_examples=300, deadline=None)
@given(problem_sizes(), st.sampled_from(PASSES), st.integers(21, 36))
def test_chunks_cover_everything_once_within_their_caps(sizes: Sizes, which: Pass, log2_limit: int) -> None:
    limit = 1 << log2_limit
    sizes = sharing_as_allowed(sizes, which, limit)
    try:
        heads, step = cut(sizes, which, limit)
    except RuntimeError:
        assert chunk_bytes(sizes, which, 1, 1, limit) > limit // 4
        return
    assume(sizes.num_kv_heads / heads * sizes.total_q / step < 10_000)
    grids = chunk_grids(sizes, which, limit)
    chunks = plan_chunks(sizes, which, limit)
    by_heads = ranges(chunks)
    assert_covers(list(by_heads), sizes.num_kv_heads)
    for queries in by_heads.values():
        assert_covers(queries, sizes.total_q)
    shapes = {(grid.chunks[0], len(grid.chunks)) for grid in grids}
    for chunk, together in shapes:
        queries_are_cut = chunk.num_queries < sizes.total_q
        assert_within_caps(sizes, which, limit, chunk, queries_are_cut, others=together - 1)


@pytest.mark.parametrize("which", PASSES)
def test_chunks_of_a_large_call_are_planned_together(which: Pass) -> None:
    """All in the forward; in the backward, where chunks have one head, those of the same head."""
    sizes = dataclasses.replace(
        SMALL, total_q=1 << 16, total_k=1 << 16, num_blocks=1025, group_size=4, head_dim=128, topk=16, block_size=64
    )
    grids = chunk_grids(sizes, which, 1 << 30)
    assert len(grids) == (1 if which == "forward" else sizes.num_kv_heads)
    assert all(len(grid.chunks) > 1 for grid in grids)


def test_every_head_in_a_chunk_though_delta_takes_the_limit() -> None:
    """What the queries are cut for then holds all of them."""
    sizes = dataclasses.replace(
        SMALL,
        total_q=1 << 20,
        total_k=1 << 20,
        num_blocks=(1 << 14) + 1,
        num_kv_heads=256,
        group_size=1,
        head_dim=64,
        topk=1,
        block_size=64,
    )
    assert sizes.delta_bytes == 1 << 30
    chunks = plan_chunks(sizes, "backward", 1 << 30)
    assert chunks == [Chunk(head, head + 1, 0, 1 << 20) for head in range(256)]


@settings(max_examples=100, deadline=None)
@given(problem_sizes(), st.sampled_from(PASSES), st.integers(1, 1 << 24))
def test_the_limit_that_the_error_names_is_enough(sizes: Sizes, which: Pass, limit: int) -> None:
    try:
        cut(sharing_as_allowed(sizes, which, limit), which, limit)
    except RuntimeError as error:
        enough = int(str(error).split(" of this call ")[1].split()[0])
        assert enough > limit
        cut(sharing_as_allowed(sizes, which, enough), which, enough)


@settings(max_examples=300, deadline=None)
@given(problem_sizes(), st.integers(20, 36))
def test_sharing_leaves_room_for_whole_query_tiles(sizes: Sizes, log2_limit: int) -> None:
    limit = 1 << log2_limit
    alone, sharing = (dataclasses.replace(sizes, shares_blocks=shares) for shares in (False, True))
    if not may_share_blocks(alone, limit):
        return
    assert sizes.scattered_bytes <= limit // 4
    _, step = cut(sharing, "forward", limit)
    assert step == sizes.total_q or step % 64 == 0


def test_sharing_asks_for_room() -> None:
    """For scattered_idx in a quarter of the limit, and for a query tile beside it."""
    few = dataclasses.replace(SMALL, total_q=100, num_kv_heads=1)
    many = dataclasses.replace(SMALL, total_q=1 << 20)
    tile = chunk_bytes(dataclasses.replace(few, shares_blocks=True), "forward", 1, 64, 1 << 40)
    for sizes, needed in ((few, tile + few.scattered_bytes), (many, 4 * many.scattered_bytes)):
        assert may_share_blocks(sizes, needed)
        assert not may_share_blocks(sizes, needed - 1)


@pytest.mark.parametrize("which", PASSES)
def test_everything_in_one_chunk_if_it_fits(which: Pass) -> None:
    needed = chunk_bytes(SMALL, which, 4, 1000, 1 << 40) + (SMALL.delta_bytes if which == "backward" else 0)
    assert plan_chunks(SMALL, which, 4 * needed) == [Chunk(0, 4, 0, 1000)]


@pytest.mark.parametrize("which", PASSES)
def test_then_whole_heads(which: Pass) -> None:
    sizes = dataclasses.replace(SMALL, num_kv_heads=5, topk=50)
    limit = chunk_bytes(sizes, which, 5, 1000, 1 << 40) // 2 + sizes.delta_bytes
    chunks = plan_chunks(sizes, which, limit)
    assert {(c.query_begin, c.query_end) for c in chunks} == {(0, 1000)}
    assert len(chunks) > 1
    assert len({c.num_heads for c in chunks[:-1]}) == 1 and chunks[-1].num_heads <= chunks[0].num_heads


def test_but_queries_of_all_heads_in_the_forward_if_that_makes_fewer_chunks() -> None:
    """At group size 2 one of four heads takes half of the limit, and a bit."""
    sizes = dataclasses.replace(
        SMALL, total_q=1 << 16, total_k=1 << 16, num_blocks=1025, group_size=2, head_dim=128, topk=16, block_size=64
    )
    assert cut(sizes, "forward", 1 << 30) == (4, 21_888)  # a third
    # Two chunks either way, where the limit leaves its sixteenth for plans beside two heads.
    two_heads = chunk_bytes(sizes, "forward", 2, 1 << 16, 1 << 40)
    assert cut(sizes, "forward", two_heads * 16 // 15 + 1) == (2, 1 << 16)


def test_but_not_if_their_blocks_have_few_edges() -> None:
    """A prefill of few queries and many keys, where every chunk would load all of these."""
    sizes = dataclasses.replace(
        SMALL, total_q=4096, total_k=1 << 17, num_blocks=2049, num_kv_heads=8, group_size=8, head_dim=128, topk=64,
        block_size=64, shares_blocks=True,
    )  # fmt: skip
    assert cut(sizes, "forward", 1 << 30) == (1, 4096)


def test_by_chunk() -> None:
    """Parts as large as the first; of the last one the beginning."""
    first, second, last = buffers.by_chunk(torch.arange(24).view(3, 2, 4), [(2, 4), (2, 4), (1, 3)])
    assert first.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert second.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert last.tolist() == [[16, 17, 18]]


@pytest.mark.parametrize("which", PASSES)
def test_then_queries_in_balanced_multiples_of_64(which: Pass) -> None:
    sizes = dataclasses.replace(SMALL, total_q=100_000)
    limit = 64 << 20
    for queries in ranges(plan_chunks(sizes, which, limit)).values():
        lengths = [end - begin for begin, end in queries]
        assert len(lengths) > 1
        assert all(length % 64 == 0 for length in lengths[:-1])
        assert lengths[0] - 64 * len(lengths) <= lengths[-1] <= lengths[0]


def test_cut_queries_are_of_all_heads_in_the_forward_and_of_one_in_the_backward() -> None:
    sizes = dataclasses.replace(SMALL, total_q=1 << 17, total_k=1 << 17, num_blocks=1025, head_dim=128, topk=64)
    assert {c.num_heads for c in plan_chunks(sizes, "forward", 1 << 30)} == {4}
    assert {c.num_heads for c in plan_chunks(sizes, "backward", 1 << 30)} == {1}


def test_accumulators_beyond_the_limit_leave_a_quarter_for_the_chunks() -> None:
    sizes = dataclasses.replace(SMALL, total_q=1 << 20, total_k=1 << 21, num_blocks=(1 << 14) + 1)
    limit = 1 << 30
    assert sizes.accumulator_bytes > limit
    chunks = plan_chunks(sizes, "backward", limit)
    assert {c.num_heads for c in chunks} == {1}
    assert limit // 8 < chunk_bytes(sizes, "backward", 1, chunks[0].num_queries, limit) <= limit // 4


def test_chunk_bytes_are_the_bytes_of_the_buffers() -> None:
    heads, queries, topk, blocks, group, head_dim = 2, 640, 5, 13, 3, 160
    edges, cells = heads * queries * topk, heads * blocks
    scratch = 4 * (cells * tiling.plan_parts(heads, queries, 1) + cells + 2 * heads)

    per_item = tiling.forward_edges_per_item(tiling.max_forward_edges_per_item(group, 64), edges, num_sms=132)
    plan = 4 * (cells + 1) + 4 * edges + 16 * (edges // per_item + cells) + 4
    # head_dim above 128: two sub-blocks of 64 keys; fp16 partial, fp32 lse, int32 exponent
    forward = edges * 2 * group * (2 * head_dim + 4) + 4 * cells * 2
    assert chunk_bytes(SMALL, "forward", heads, queries, 1 << 30) == scratch + plan + forward

    per_item = tiling.backward_edges_per_item(edges, heads, num_sms=132)
    plan = 4 * (cells + 1) + 4 * edges + 16 * (edges // per_item + cells) + 4
    backward = edges * 2 * group * 2 * head_dim + (2 * edges // per_item + 1) * 2 * 4 * 128 * head_dim
    assert chunk_bytes(SMALL, "backward", heads, queries, 1 << 30) == scratch + plan + backward


@given(problem_sizes(), st.integers(1, 1 << 21))
def test_query_ranges_leave_half_an_item_a_cell(sizes: Sizes, num_queries: int) -> None:
    num_ranges = buffers.query_ranges(sizes, "forward", num_queries)
    assert num_ranges >= 1 and buffers.query_ranges(sizes, "backward", num_queries) == 1
    per_item = buffers.edges_per_item(sizes, "forward", 1, num_queries, 1 << 30)
    assert num_ranges == 1 or 2 * num_queries * sizes.topk / (per_item * num_ranges) >= sizes.num_blocks


def test_pieces_take_at_most_a_quarter_of_the_limit() -> None:
    sizes = dataclasses.replace(SMALL, head_dim=256, block_size=256, topk=512)
    limit = 1 << 30
    per_item = edges_per_item(sizes, "backward", 4, 100_000, limit)
    assert buffers.backward_buffers(sizes, 4, 100_000, per_item)["dkv_pieces"].bytes <= limit // 4
