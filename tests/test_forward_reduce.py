"""forward_reduce: out and lse from partials, whatever lies in the slots that attend to nothing."""

from __future__ import annotations

import dataclasses

import pytest
import stage_reference
import torch
from partials import assert_results, chunk_of, empty_results, make_partials, unscaled
from stages import BACKENDS, CASES, DTYPES, Case, forward_buffers, load_stages, make_chunk, make_problem
from tolerances import Expected, assert_close
from torch import Tensor

from fsa.problem import Chunk, Problem


def run(backend: str, problem: Problem, chunk: Chunk, partials: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """out and lse of the whole problem; what the chunk does not have is NaN."""
    out, lse = empty_results(problem)
    load_stages(backend, problem.q.dtype).forward_reduce(problem, chunk, **partials, out=out, lse=lse)
    return out, lse


def expected(problem: Problem, chunk: Chunk, partials: dict[str, Tensor]) -> tuple[Expected, Expected]:
    """out [queries, heads, head_dim] and lse [heads, queries] of the chunk."""
    output, lse = unscaled(problem, chunk, partials), partials["lse_partial"]

    def result(index: int) -> Expected:
        return stage_reference.expected(
            lambda a: stage_reference.merged(problem, chunk, output, lse, a)[index], problem.q.dtype
        )

    return result(0), result(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_reduce(backend: str, case: Case, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    partials = make_partials(problem, chunk)
    results = run(backend, problem, chunk, partials)
    assert_results(problem, chunk, results, expected(problem, chunk, partials))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_attended(backend: str) -> None:
    load_stages(backend, torch.float16)
    problem, chunk = make_problem(CASES[0], torch.float16), make_chunk(CASES[0])
    problem = dataclasses.replace(problem, topk_idx=torch.full_like(problem.topk_idx, -1))
    out, lse = run(backend, problem, chunk, forward_buffers(problem, chunk))
    assert not out.any()
    assert lse.isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_agrees_with_triton(case: Case, dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    partials = make_partials(problem, chunk)
    cuda, triton = run("cuda", problem, chunk, partials), run("triton", problem, chunk, partials)
    expected_out, expected_lse = expected(problem, chunk, partials)
    queries, heads = chunk_of(problem, chunk)
    out, lse = triton[0][queries, heads], triton[1][heads, queries]
    assert_close("out", cuda[0][queries, heads], stage_reference.recentred(expected_out, out))
    assert_close("lse", cuda[1][heads, queries], stage_reference.recentred(expected_lse, lse))
