"""backward_reduce: dq from its partials, dk and dv of cut cells from their pieces."""

from __future__ import annotations

import pytest
import stage_reference
import torch
from reference import EXACT, Arithmetic
from stages import (
    BACKENDS,
    CASES,
    CASES_AND_ACCUMULATE,
    DTYPES,
    Case,
    backward_buffers,
    load_stages,
    make_chunk,
    make_problem,
)
from tolerances import Expected, assert_close
from torch import Tensor

from fsa.problem import Chunk, Plan, Problem

EDGES_PER_ITEM = 64


def make_parts(problem: Problem, chunk: Chunk, plan: Plan) -> dict[str, Tensor]:
    """Random partials and pieces where backward_main would write them, poison elsewhere."""
    generator = torch.Generator().manual_seed(1)
    parts = backward_buffers(problem, chunk, plan.edges_per_item)
    tile_k = parts["dkv_pieces"].shape[3]
    attended = stage_reference.selection(problem, chunk, tile_k).attended
    written = stage_reference.written_pieces(plan, parts["dkv_pieces"])
    for name, mask in (("dq_partial", attended), ("dkv_pieces", written)):
        random = torch.randn(parts[name].shape, generator=generator).to(attended.device)
        parts[name][mask] = random[mask].to(parts[name].dtype)
    return parts


def run(
    backend: str, problem: Problem, chunk: Chunk, plan: Plan, parts: dict[str, Tensor], accumulate: bool = False
) -> dict[str, Tensor]:
    """dq of the whole problem, NaN before; dk and dv: views of the chunk's heads, zero, or one to accumulate on."""
    results = {"dq": torch.full(problem.q.shape, torch.nan, dtype=problem.q.dtype, device=problem.q.device)}
    dtype = torch.float32 if accumulate else problem.q.dtype
    for name in ("dk", "dv"):
        whole = torch.full(problem.k.shape, float(accumulate), dtype=dtype, device=problem.q.device)
        results[name] = whole[:, chunk.head_begin : chunk.head_end]
    stages = load_stages(backend, problem.q.dtype)
    stages.backward_reduce(problem, chunk, plan, **parts, **results, accumulate=accumulate)
    return results


def expected(
    problem: Problem, chunk: Chunk, plan: Plan, parts: dict[str, Tensor], accumulate: bool = False
) -> tuple[dict[str, Expected], Tensor]:
    """dq of the chunk, dk and dv by name, and the keys [total_k, heads] of cut cells."""

    def dkv(arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        return stage_reference.dkv_of_pieces(problem, chunk, plan, parts["dkv_pieces"], arithmetic)

    def gradient(index: int) -> Expected:
        return stage_reference.expected(
            lambda a: dkv(a)[0][index] + 1 if accumulate else a.rounded(dkv(a)[0][index]), problem.q.dtype
        )

    dq = stage_reference.expected(
        lambda a: stage_reference.dq_of_partials(problem, chunk, parts["dq_partial"], a), problem.q.dtype
    )
    return {"dq": dq, "dk": gradient(0), "dv": gradient(1)}, dkv(EXACT)[1]


def of_chunk(problem: Problem, chunk: Chunk, dq: Tensor) -> Tensor:
    heads = slice(chunk.head_begin * problem.group_size, chunk.head_end * problem.group_size)
    return dq[chunk.query_begin : chunk.query_end, heads]


@pytest.mark.parametrize(("case", "accumulate"), CASES_AND_ACCUMULATE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_reduce(backend: str, case: Case, dtype: torch.dtype, accumulate: bool) -> None:
    load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    plan = stage_reference.plan(problem, chunk, EDGES_PER_ITEM)
    parts = make_parts(problem, chunk, plan)
    results = run(backend, problem, chunk, plan, parts, accumulate)
    wanted, keys = expected(problem, chunk, plan, parts, accumulate)

    assert_close("dq", of_chunk(problem, chunk, results["dq"]), wanted["dq"])
    of_chunk(problem, chunk, results["dq"]).fill_(torch.nan)
    assert results["dq"].isnan().all(), "dq: written outside the chunk"
    for name in ("dk", "dv"):
        assert_close(name, results[name], wanted[name])
        assert (results[name][~keys] == float(accumulate)).all(), f"{name}: written where no cell is cut"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_agrees_with_triton(case: Case, dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    plan = stage_reference.plan(problem, chunk, EDGES_PER_ITEM)
    parts = make_parts(problem, chunk, plan)
    cuda, triton = (run(backend, problem, chunk, plan, parts) for backend in ("cuda", "triton"))
    wanted, _ = expected(problem, chunk, plan, parts)
    for results in (cuda, triton):
        results["dq"] = of_chunk(problem, chunk, results["dq"])
    for name, result in cuda.items():
        assert_close(name, result, stage_reference.recentred(wanted[name], triton[name]))
