"""forward_reduce: out and lse from partials, whatever lies in the slots that attend to nothing."""

from __future__ import annotations

import dataclasses

import pytest
import stage_reference
import torch
from reference import EXACT
from stages import BACKENDS, CASES, DTYPES, Case, forward_buffers, load_stages, make_chunk, make_problem
from tolerances import Expected, assert_close
from torch import Tensor

from fsa.problem import Chunk, Problem


def make_partials(problem: Problem, chunk: Chunk) -> dict[str, Tensor]:
    """What forward_main would leave, in poisoned buffers."""
    buffers = forward_buffers(problem, chunk)
    tile_k = problem.block_size // buffers["o_partial"].shape[3]
    attended = stage_reference.selection(problem, chunk, tile_k).attended
    exponents, defined = stage_reference.value_exponent(problem, chunk, tile_k)
    exponents += torch.arange(exponents.shape[1], device=exponents.device)[:, None] % 3  # reduce only undoes them
    output = stage_reference.partial_output(problem, chunk, tile_k, EXACT)
    by_slot = stage_reference.exponent_of_partials(problem, chunk, exponents)
    output *= torch.ldexp(torch.ones_like(by_slot, dtype=torch.float64), -by_slot)[..., None, None]
    lse = stage_reference.partial_lse(problem, chunk, tile_k, EXACT)
    buffers["o_partial"][attended] = output[attended].to(buffers["o_partial"].dtype)
    buffers["lse_partial"][attended] = lse[attended].float()
    buffers["value_exponent"][defined] = exponents[defined]
    return buffers


def run(backend: str, problem: Problem, chunk: Chunk, partials: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """out and lse of the whole problem; what the chunk does not have is NaN."""
    out = torch.full(problem.q.shape, torch.nan, dtype=problem.q.dtype, device=problem.q.device)
    lse = torch.full((problem.num_heads, problem.total_q), torch.nan, device=problem.q.device)
    load_stages(backend, problem.q.dtype).forward_reduce(problem, chunk, **partials, out=out, lse=lse)
    return out, lse


def expected(problem: Problem, chunk: Chunk, partials: dict[str, Tensor]) -> tuple[Expected, Expected]:
    """out [queries, heads, head_dim] and lse [heads, queries] of the chunk."""
    by_slot = stage_reference.exponent_of_partials(problem, chunk, partials["value_exponent"])
    output = torch.ldexp(partials["o_partial"].double(), by_slot[..., None, None])

    def result(index: int) -> Expected:
        return stage_reference.expected(
            lambda a: stage_reference.merged(problem, chunk, output, partials["lse_partial"], a)[index], problem.q.dtype
        )

    return result(0), result(1)


def chunk_of(problem: Problem, chunk: Chunk) -> tuple[slice, slice]:
    """Query tokens and query heads."""
    group = problem.group_size
    return slice(chunk.query_begin, chunk.query_end), slice(chunk.head_begin * group, chunk.head_end * group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_reduce(backend: str, case: Case, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    partials = make_partials(problem, chunk)
    out, lse = run(backend, problem, chunk, partials)
    expected_out, expected_lse = expected(problem, chunk, partials)
    queries, heads = chunk_of(problem, chunk)
    assert_close("out", out[queries, heads], expected_out)
    assert_close("lse", lse[heads, queries], expected_lse)
    for name, rest in (("out", out.transpose(0, 1)), ("lse", lse)):
        rest[heads, queries] = torch.nan
        assert rest.isnan().all(), f"{name}: written outside the chunk"


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
