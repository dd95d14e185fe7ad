"""forward_main: partial outputs, their lse and the exponents of V, and that nothing else is written."""

from __future__ import annotations

import dataclasses

import pytest
import stage_reference
import torch
from reference import Arithmetic
from stages import (
    BACKENDS,
    CASES,
    DTYPES,
    POISON,
    Case,
    forward_buffers,
    load_stages,
    make_chunk,
    make_problem,
)
from tolerances import Expected, assert_close
from torch import Tensor

from fsa import tiling
from fsa.problem import Chunk, Plan, Problem

EDGES_PER_ITEM = 64


def make_plan(problem: Problem, chunk: Chunk) -> Plan:
    """As the forward plans, but for shorter items."""
    return stage_reference.plan(problem, chunk, EDGES_PER_ITEM, min_rest=tiling.forward_min_rest(EDGES_PER_ITEM))


def run(backend: str, problem: Problem, chunk: Chunk) -> dict[str, Tensor]:
    """forward_main on poisoned buffers."""
    buffers = forward_buffers(problem, chunk)
    load_stages(backend, problem.q.dtype).forward_main(problem, chunk, make_plan(problem, chunk), **buffers)
    return buffers


def tile_k_of(problem: Problem, buffers: dict[str, Tensor]) -> int:
    return problem.block_size // buffers["o_partial"].shape[3]


def expected(problem: Problem, chunk: Chunk, tile_k: int) -> dict[str, Expected]:
    """o_partial, times 2^-value_exponent, and lse_partial, where something is attended."""
    attended = stage_reference.selection(problem, chunk, tile_k).attended
    exponents, _ = stage_reference.value_exponent(problem, chunk, tile_k)
    exponents = stage_reference.exponent_of_partials(problem, chunk, exponents)
    scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), -exponents)[..., None, None]

    def output(arithmetic: Arithmetic) -> Tensor:
        return stage_reference.partial_output(problem, chunk, tile_k, arithmetic) * scale

    def lse(arithmetic: Arithmetic) -> Tensor:
        return stage_reference.partial_lse(problem, chunk, tile_k, arithmetic)

    answers = {
        name: stage_reference.expected(f, problem.q.dtype) for name, f in (("o_partial", output), ("lse_partial", lse))
    }
    return {name: stage_reference.masked(wanted, attended) for name, wanted in answers.items()}


def assert_partials(problem: Problem, chunk: Chunk, buffers: dict[str, Tensor]) -> None:
    tile_k = tile_k_of(problem, buffers)
    attended = stage_reference.selection(problem, chunk, tile_k).attended
    exponents, defined = stage_reference.value_exponent(problem, chunk, tile_k)
    assert torch.equal(buffers["value_exponent"][defined], exponents[defined])
    for name, wanted in expected(problem, chunk, tile_k).items():
        assert_close(name, buffers[name][attended], wanted)
        assert buffers[name][~attended].isnan().all(), f"{name}: written where nothing is attended"


def test_cases_have_items_that_took_a_rest() -> None:
    plans = [make_plan(make_problem(case, torch.float16), make_chunk(case)) for case in CASES]
    assert any((plan.work_items[:, 2] - plan.work_items[:, 1] > EDGES_PER_ITEM).any() for plan in plans)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_main(backend: str, case: Case, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    buffers = run(backend, problem, chunk)
    assert_partials(problem, chunk, buffers)
    blocks = stage_reference.selection(problem, chunk, problem.block_size).block
    for head, exponents in enumerate(buffers["value_exponent"]):
        selected = set(blocks[head].flatten().tolist())
        unselected = [block for block in range(problem.num_blocks) if block not in selected]
        assert (exponents[unselected] == POISON).all()


@pytest.mark.parametrize(
    ("dtype", "log2_size"),
    [(torch.float16, 14), *((dtype, size) for dtype in DTYPES[1:] for size in (-110, 100))],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_any_size(backend: str, dtype: torch.dtype, log2_size: int) -> None:
    load_stages(backend, dtype)
    case = CASES[0]
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    values = problem.v.double().clamp(-3.9, 3.9) * 2.0**log2_size
    problem = dataclasses.replace(problem, v=values.to(dtype))
    assert_partials(problem, chunk, run(backend, problem, chunk))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_values_reach_only_who_sees_them(backend: str, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    case = Case("nonfinite", (70,), (70,), 1, 3, 24, 2, 32)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    v = problem.v.clone()
    v[5, 0, 3], v[9, 0, 3], v[12, 0, 4], v[40, 0], v[66, 0, 0] = torch.inf, -torch.inf, torch.inf, torch.nan, -torch.inf
    problem = dataclasses.replace(problem, v=v)
    buffers = run(backend, problem, chunk)
    assert_partials(problem, chunk, buffers)
    attended = stage_reference.selection(problem, chunk, tile_k_of(problem, buffers)).attended
    output = buffers["o_partial"][attended]
    assert output.isnan().any() and output.isposinf().any() and output.isneginf().any() and output.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_keys_reach_only_who_sees_them(backend: str, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    case = Case("nonfinite", (70,), (70,), 1, 3, 24, 2, 32)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    k = problem.k.clone()
    k[9, 0, 3], k[40, 0] = torch.nan, torch.nan
    problem = dataclasses.replace(problem, k=k)
    assert_partials(problem, chunk, run(backend, problem, chunk))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend: str, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    case = Case("logits", (70,), (70,), 1, 2, 64, 2, 32)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    problem = dataclasses.replace(problem, q=problem.q * 100, k=problem.k * 100)
    assert_partials(problem, chunk, run(backend, problem, chunk))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_agrees_with_triton(case: Case, dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    cuda, triton = run("cuda", problem, chunk), run("triton", problem, chunk)
    tile_k = tile_k_of(problem, triton)
    _, defined = stage_reference.value_exponent(problem, chunk, tile_k)
    assert torch.equal(cuda["value_exponent"][defined], triton["value_exponent"][defined])

    attended = stage_reference.selection(problem, chunk, tile_k).attended
    for name, wanted in expected(problem, chunk, tile_k).items():
        assert_close(name, cuda[name][attended], stage_reference.recentred(wanted, triton[name][attended]))
