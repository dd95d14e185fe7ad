"""backward_main: dq's partials, dk and dv of cells that are one work item, the pieces of the others."""

from __future__ import annotations

import dataclasses

import pytest
import stage_reference
import torch
from reference import EXACT, MAGNITUDES, Arithmetic, torch_arithmetic
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
    strided_rows,
)
from tolerances import Expected, assert_close
from torch import Tensor

from fsa import tiling
from fsa.problem import Chunk, Plan, Problem

EDGES_PER_ITEM = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What comes from the forward and from the gradient of its results."""

    dout: Tensor
    lse: Tensor
    delta: Tensor


def make_given(problem: Problem) -> Given:
    """dout and dlse are random; out and lse are what the forward gives."""
    generator = torch.Generator().manual_seed(1)
    whole = Chunk(0, problem.num_kv_heads, 0, problem.total_q)
    tile_k = problem.block_size
    output, lse = (
        function(problem, whole, tile_k, EXACT)
        for function in (stage_reference.partial_output, stage_reference.partial_lse)
    )
    out, lse = stage_reference.merged(problem, whole, output, lse, EXACT)
    dout = strided_rows(problem.total_q, problem.num_heads, problem.head_dim, problem.q.dtype, generator)
    dlse = torch.randn(lse.shape, generator=generator).to(lse.device)
    delta = stage_reference.delta(out.to(problem.q.dtype), dout, dlse, EXACT)
    return Given(dout, lse.float().contiguous(), delta.float())


def run(
    backend: str, problem: Problem, chunk: Chunk, plan: Plan, given: Given, accumulate: bool = False
) -> dict[str, Tensor]:
    """backward_main on poisoned buffers; dk and dv are views of the chunk's heads, zero, or one to accumulate on."""
    results = backward_buffers(problem, chunk, plan.edges_per_item)
    dtype = torch.float32 if accumulate else problem.q.dtype
    for name in ("dk", "dv"):
        whole = torch.full(problem.k.shape, float(accumulate), dtype=dtype, device=problem.q.device)
        results[name] = whole[:, chunk.head_begin : chunk.head_end]
    stages = load_stages(backend, problem.q.dtype)
    stages.backward_main(problem, chunk, plan, given.dout, given.lse, given.delta, **results, accumulate=accumulate)
    return results


def expected(
    problem: Problem, chunk: Chunk, plan: Plan, given: Given, accumulate: bool = False
) -> tuple[dict[str, Expected], dict[str, Tensor]]:
    """What backward_main leaves, by name, and where it has something to add (masks over leading dimensions)."""
    tile_k = tiling.backward_tile_k(problem.head_dim, problem.block_size)
    chosen = stage_reference.selection(problem, chunk, tile_k)
    uncut = stage_reference.uncut_edges(problem, chunk, plan)
    ones = torch.ones(*chosen.visible.shape, 1, device=uncut.device)
    seen = stage_reference.summed_by_key(problem, chosen, ones, uncut)[..., 0] > 0
    written = {"dq_partial": chosen.attended, "dk": seen, "dv": seen}

    def answers(arithmetic: Arithmetic) -> dict[str, Tensor]:
        gradients = stage_reference.edge_gradients(
            problem, chunk, tile_k, given.dout, given.lse, given.delta, arithmetic
        )
        pieces = stage_reference.summed_by_piece(problem, chunk, plan, gradients)
        written["dkv_pieces"] = stage_reference.written_pieces(plan, pieces)
        dk, dv = (stage_reference.summed_by_key(problem, chosen, x, uncut) for x in (gradients.dk, gradients.dv))
        if not accumulate:
            dk, dv = arithmetic.rounded(dk), arithmetic.rounded(dv)
        dq_partial = arithmetic.rounded(gradients.dq)
        return {"dq_partial": dq_partial, "dkv_pieces": pieces, "dk": dk + accumulate, "dv": dv + accumulate}

    exact, torch_answers, magnitudes = (answers(a) for a in (EXACT, torch_arithmetic(problem.q.dtype), MAGNITUDES))
    return {name: Expected(exact[name], torch_answers[name], magnitudes[name]) for name in exact}, written


def assert_gradients(results: dict[str, Tensor], wanted: dict[str, Expected], written: dict[str, Tensor]) -> None:
    for name, mask in written.items():
        if mask.any():
            assert_close(name, results[name][mask], stage_reference.masked(wanted[name], mask))
    for name in ("dq_partial", "dkv_pieces"):
        assert results[name][~written[name]].isnan().all(), f"{name}: written where nothing is to be"
    for name in ("dk", "dv"):
        kept = wanted[name].exact[~written[name]]
        assert torch.equal(results[name][~written[name]].double(), kept), (
            f"{name}: changed where nothing is to be added"
        )


@pytest.mark.parametrize(("case", "accumulate"), CASES_AND_ACCUMULATE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_main(backend: str, case: Case, dtype: torch.dtype, accumulate: bool) -> None:
    load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    plan, given = stage_reference.plan(problem, chunk, EDGES_PER_ITEM), make_given(problem)
    results = run(backend, problem, chunk, plan, given, accumulate)
    assert_gradients(results, *expected(problem, chunk, plan, given, accumulate))


def test_cases_have_cut_cells() -> None:
    cut = [stage_reference.plan(make_problem(c, torch.float16), make_chunk(c), EDGES_PER_ITEM) for c in CASES]
    assert any((plan.csr_offsets.diff() > 2 * EDGES_PER_ITEM).any() for plan in cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_keys_and_values_reach_only_who_sees_them(backend: str, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    case = Case("nonfinite", (70,), (70,), 1, 3, 24, 2, 32)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    k, v = problem.k.clone(), problem.v.clone()
    k[9, 0, 3], v[40, 0] = torch.nan, torch.nan
    problem = dataclasses.replace(problem, k=k, v=v)
    plan, given = stage_reference.plan(problem, chunk, EDGES_PER_ITEM), make_given(problem)
    results = run(backend, problem, chunk, plan, given)
    assert results["dq_partial"].isnan().any() and results["dq_partial"].isfinite().any()
    assert_gradients(results, *expected(problem, chunk, plan, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_agrees_with_triton(case: Case, dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    plan, given = stage_reference.plan(problem, chunk, EDGES_PER_ITEM), make_given(problem)
    cuda, triton = (run(backend, problem, chunk, plan, given) for backend in ("cuda", "triton"))
    wanted, written = expected(problem, chunk, plan, given)
    for name, mask in written.items():
        if mask.any():
            agreed = stage_reference.recentred(stage_reference.masked(wanted[name], mask), triton[name][mask])
            assert_close(name, cuda[name][mask], agreed)
