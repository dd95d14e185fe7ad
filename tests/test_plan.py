"""plan: the edges of every cell in order, and the work items, exactly."""

from __future__ import annotations

import dataclasses

import pytest
import stage_reference
import torch
from stages import BACKENDS, CASES, Case, alone, load_stages, make_chunk, make_problem
from torch import Tensor

from fsa.problem import ChunkGrid, Plan

HOSTILE_CU_SEQLENS = (
    [0, 200, 100, 127],  # descending
    [5, 40, 40, 90],  # neither from 0 nor to the end
    [-50, 2**31 - 1, 300, -(2**31)],
    [127, 127, 127, 127],
)


def used(plan: Plan) -> Tensor:
    """csr_edges without its unwritten tail."""
    return plan.csr_edges[: int(plan.csr_offsets[-1])]


def assert_same_plan(actual: Plan, wanted: Plan) -> None:
    assert actual.csr_offsets.dtype == actual.csr_edges.dtype == actual.work_items.dtype == torch.int32
    assert torch.equal(actual.next_item, wanted.next_item)
    assert torch.equal(actual.csr_offsets, wanted.csr_offsets)
    assert torch.equal(used(actual), used(wanted))
    assert torch.equal(actual.work_items[:, 0], wanted.work_items[:, 0])
    unused = wanted.work_items[:, :1] < 0
    assert torch.equal(actual.work_items.masked_fill(unused, -1), wanted.work_items.masked_fill(unused, -1))


@pytest.mark.parametrize(
    ("edges_per_item", "num_ranges", "min_rest"),
    [(64, 1, 1), (64, 1, 64), (32, 1, 16), (192, 1, 96), (64, 3, 32), (64, 50, 1)],
)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_plan(backend: str, case: Case, edges_per_item: int, num_ranges: int, min_rest: int) -> None:
    stages, problem, chunk = load_stages(backend), make_problem(case, torch.float16), make_chunk(case)
    (plan,) = stages.plan(problem, alone(chunk), edges_per_item, num_ranges, min_rest)
    assert plan.edges_per_item == edges_per_item
    assert plan.csr_edges.shape == (chunk.num_heads * chunk.num_queries * problem.topk,)
    assert_same_plan(plan, stage_reference.plan(problem, chunk, edges_per_item, num_ranges, min_rest))


@pytest.mark.parametrize("num_ranges", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_that_are_planned_together(backend: str, num_ranges: int) -> None:
    """The last heads and the last queries are fewer."""
    case = Case("together", (70, 60), (70, 80), 5, 1, 8, 3, 32)
    stages, problem = load_stages(backend), make_problem(case, torch.float16)
    grid = ChunkGrid(0, 5, 3, 127, chunk_heads=2, chunk_queries=50)
    chunks, plans = grid.chunks, stages.plan(problem, grid, 32, num_ranges, 20)
    assert [chunk.num_heads for chunk in chunks] == [2] * 6 + [1] * 3
    assert [chunk.num_queries for chunk in chunks] == [50, 50, 24] * 3
    for chunk, plan in zip(chunks, plans, strict=True):
        assert_same_plan(plan, stage_reference.plan(problem, chunk, 32, num_ranges, 20))


@pytest.mark.parametrize(
    ("num_edges", "items"),
    [(64, [64]), (95, [95]), (96, [64, 32]), (127, [64, 63]), (128, [64, 64]), (159, [64, 95]), (160, [64, 64, 32])],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_short_rests_are_part_of_the_item_before(backend: str, num_edges: int, items: list[int]) -> None:
    case = Case("rests", (num_edges,), (32,), 1, 1, 8, 1, 32)
    problem = make_problem(case, torch.float16)
    problem = dataclasses.replace(problem, topk_idx=torch.zeros_like(problem.topk_idx), causal=False)
    (plan,) = load_stages(backend).plan(problem, alone(make_chunk(case)), 64, min_rest=32)
    used_items = plan.work_items[plan.work_items[:, 0] >= 0]
    assert (used_items[:, 2] - used_items[:, 1]).tolist() == items


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_selected(backend: str) -> None:
    stages, case = load_stages(backend), CASES[0]
    problem = make_problem(case, torch.float16)
    problem = dataclasses.replace(problem, topk_idx=torch.full_like(problem.topk_idx, -1))
    (plan,) = stages.plan(problem, alone(make_chunk(case)), 64)
    assert not plan.csr_offsets.any()
    assert (plan.work_items[:, 0] == -1).all()


@pytest.mark.parametrize("num_ranges", [1, 2])
def test_cuda_equals_triton(num_ranges: int) -> None:
    cuda, triton = load_stages("cuda"), load_stages("triton")
    case = Case("long", (30000, 1, 20000), (30000, 2, 21000), 4, 1, 8, 16, 64, popular=True)
    problem, grid = make_problem(case, torch.float16), alone(make_chunk(case))
    (ours,), (wanted,) = (stages.plan(problem, grid, 1024, num_ranges, 512) for stages in (cuda, triton))
    assert_same_plan(ours, wanted)


def test_more_blocks_than_a_cta_counts_at_a_time() -> None:
    """The CUDA plan takes the blocks in windows of 2048."""
    case = Case("windows", (100, 200), (70000, 80000), 2, 1, 8, 7, 32, popular=True)
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    assert problem.num_blocks > 4096
    (plan,) = load_stages("cuda").plan(problem, alone(chunk), 64, 2)
    assert_same_plan(plan, stage_reference.plan(problem, chunk, 64, 2))


@pytest.mark.parametrize("num_ranges", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_work_items_walk_one_range_after_the_other(backend: str, num_ranges: int) -> None:
    case = Case("ranges", (500,), (500,), 2, 1, 8, 4, 32)
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    (plan,) = load_stages(backend).plan(problem, alone(chunk), 64, num_ranges)
    used_items = plan.work_items[plan.work_items[:, 0] >= 0]
    assert torch.equal(used_items[1:, 1], used_items[:-1, 2])  # the items follow each other through csr_edges
    ranges = plan.csr_edges[used_items[:, 1].long()] // problem.topk // (500 // num_ranges)
    heads = used_items[:, 0] // problem.num_blocks
    order = (heads * num_ranges + ranges).tolist()
    assert order == sorted(order) and len(set(order)) == 2 * num_ranges


@pytest.mark.parametrize("cu_seqlens", HOSTILE_CU_SEQLENS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_cu_seqlens_stay_in_bounds(backend: str, cu_seqlens: list[int]) -> None:
    """Any cu_seqlens: every edge stands once at most, in a cell of the chunk and of its own head."""
    case = Case("hostile", (50, 0, 77), (50, 0, 77), 2, 1, 8, 5, 32)
    stages, problem, chunk = load_stages(backend), make_problem(case, torch.float16), make_chunk(case)
    hostile = torch.tensor(cu_seqlens, dtype=torch.int32, device=problem.q.device)
    problem = dataclasses.replace(problem, cu_seqlens_q=hostile, cu_seqlens_k=hostile)
    (plan,) = stages.plan(problem, alone(chunk), 64)

    edges_per_head = chunk.num_queries * problem.topk
    offsets = plan.csr_offsets.tolist()
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= chunk.num_heads * edges_per_head
    for head in range(chunk.num_heads):
        edges = plan.csr_edges[offsets[head * problem.num_blocks] : offsets[(head + 1) * problem.num_blocks]]
        assert edges.unique().numel() == edges.numel()
        assert ((edges >= 0) & (edges < edges_per_head)).all()
    cell, begin, end, sequence = plan.work_items[plan.work_items[:, 0] >= 0].T
    assert (cell < chunk.num_heads * problem.num_blocks).all()
    assert torch.equal(torch.sort(cell.long())[0].bincount(end - begin, len(offsets) - 1), plan.csr_offsets.diff())
    assert ((sequence >= 0) & (sequence < problem.batch)).all()


def test_one_part_counts_a_popular_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """More edges of one cell before a warp's first than 16 bits hold, and more queries than a tile has."""
    stages = load_stages("cuda")
    monkeypatch.setattr(stages, "plan_parts", lambda *_: 1)
    case = Case("one_block", (20000,), (20000,), 1, 1, 8, 4, 256)
    problem = make_problem(case, torch.float16)
    problem = dataclasses.replace(problem, topk_idx=torch.zeros_like(problem.topk_idx))
    (plan,) = stages.plan(problem, alone(make_chunk(case)), 1024)
    assert torch.equal(used(plan), torch.arange(80000, dtype=torch.int32, device=plan.csr_edges.device))
