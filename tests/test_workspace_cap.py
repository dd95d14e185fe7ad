"""The workspace limit: kept whatever the selection, and cutting a call into chunks does not change what it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import Case
from harness import (
    DEVICE,
    HAS_GPU,
    MAIN_TARGETS,
    Target,
    assert_same_bits,
    forward,
    large_inputs,
    peak_memory_of,
    run,
    skip_unless_usable,
)
from reference import Results
from stages import record_shared_blocks
from tolerances import assert_results, expected_results
from torch import Tensor

import fsa
from fsa import backends, tiling
from fsa.problem import Chunk, ChunkGrid, Plan

pytestmark = pytest.mark.usefixtures("workspace_limit")
MIB = 2**20

CUT_CASE = (
    Case("cut", (1400, 600), num_kv_heads=5, group_size=4, head_dim=64, block_size=64, topk=8)
    if HAS_GPU
    else Case("cut", (200, 33), num_kv_heads=3, group_size=4, head_dim=8, block_size=64, topk=2)
)
# Limits under which it is cut, and shares blocks.
CUT_LIMITS = {"heads": 28 * MIB, "queries": 4 * MIB} if HAS_GPU else {"heads": 110_000, "queries": 30_000}


def _record_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """Will hold the chunks of all calls to come: the first stage sees each."""
    stages, chunks = backends.stages(backend), []
    plan: Callable[..., list[Plan]] = stages.plan

    def recording_plan(problem: object, grid: ChunkGrid, *arguments: int) -> list[Plan]:
        chunks.extend(grid.chunks)
        return plan(problem, grid, *arguments)

    monkeypatch.setattr(stages, "plan", recording_plan)
    return chunks


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
@pytest.mark.parametrize("cut", CUT_LIMITS)
def test_a_call_in_chunks_is_as_exact(
    cut: str, target: Target, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    skip_unless_usable(target.backend)
    inputs = CUT_CASE.inputs(target.dtype, DEVICE)
    chunks = _record_chunks(target.backend, monkeypatch)
    shares_blocks = target.backend == "cuda" and backends.kernel_arch(DEVICE) >= 90
    shared = record_shared_blocks(monkeypatch) if shares_blocks else []
    fsa.set_workspace_limit(CUT_LIMITS[cut])
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = forward(inputs.replace(q=q, k=k, v=v), target.backend)
    num_forward = len(chunks)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
    assert_results(Results(out.detach(), lse.detach(), *gradients), expected_results(inputs))

    for one_pass in (chunks[:num_forward], chunks[num_forward:]):
        assert len(one_pass) > 1
        assert all(chunk.num_queries < len(inputs.q) for chunk in one_pass) == (cut == "queries")
    if shares_blocks:
        assert len(shared) == num_forward and sum(shared) > 0


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
def test_query_ranges_are_as_exact(target: Target, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """As many ranges as keep half a work item a cell, where they would be one: small problems fit in L2."""
    skip_unless_usable(target.backend)
    inputs = Case("ranges", (150, 33), num_kv_heads=2, group_size=16, head_dim=16, topk=9).inputs(target.dtype, DEVICE)
    monkeypatch.setattr(tiling, "_QUERY_BYTES_IN_L2", 1)
    stages, num_ranges = backends.stages(target.backend), []
    plan: Callable[..., list[Plan]] = stages.plan

    def recording_plan(
        problem: object, grid: ChunkGrid, edges_per_item: int, ranges: int = 1, min_rest: int = 1
    ) -> list[Plan]:
        num_ranges.append(ranges)
        return plan(problem, grid, edges_per_item, ranges, min_rest)

    monkeypatch.setattr(stages, "plan", recording_plan)
    assert_results(run(inputs, target.backend), expected_results(inputs))
    forward_ranges, backward_ranges = num_ranges
    assert forward_ranges > 1 and backward_ranges == 1


@pytest.mark.gpu
@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
def test_a_call_in_chunks_is_deterministic(target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs = CUT_CASE.inputs(target.dtype, DEVICE)
    fsa.set_workspace_limit(CUT_LIMITS["queries"])
    first = run(inputs, target.backend)
    for _ in range(4):
        assert_same_bits(first, run(inputs, target.backend))


# ---------------------------------------------------------------------------------------------------------------------
# Memory in use
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
@pytest.mark.parametrize("limit", [1024 * MIB, 300 * MIB], ids=["1GiB", "300MiB"])
@pytest.mark.parametrize("popularity", [1, 30], ids=["random", "popular"])
def test_peak_memory_keeps_to_the_limit(popularity: float, limit: int, target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs = large_inputs([32_768], num_kv_heads=4, group_size=4, popularity=popularity, dtype=target.dtype)
    partials = 2 * inputs.topk_idx.numel() * inputs.group_size * inputs.q.shape[-1]
    assert partials > 1.9 * limit
    if popularity > 1:
        assert (inputs.topk_idx == 0).float().mean() > 0.5

    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    fsa.set_workspace_limit(limit)
    found: list[Tensor] = []
    rounding = MIB  # of the allocator, for a few dozen tensors
    outputs = inputs.q.nbytes + inputs.dlse.nbytes
    assert peak_memory_of(lambda: found.extend(forward(inputs, target.backend))) <= outputs + limit + rounding

    gradients = inputs.q.nbytes + inputs.k.nbytes + inputs.v.nbytes
    backward = functools.partial(torch.autograd.grad, found, (q, k, v), (inputs.dout, inputs.dlse))
    assert peak_memory_of(backward) <= gradients + limit + rounding
