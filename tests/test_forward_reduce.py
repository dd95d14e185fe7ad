"""forward_reduce: out and lse from partials, whatever lies in the slots that attend to nothing."""

from __future__ import annotations

import dataclasses

import pytest
import stage_reference
import torch
from reference import EXACT
from stage_reference import SHARED_SLOT
from stages import BACKENDS, CASES, DTYPES, POISON, Case, forward_buffers, load_stages, make_chunk, make_problem
from tolerances import Expected, assert_close
from torch import Tensor

from fsa.problem import Chunk, Problem

# Blocks of two sub-blocks.
SHARED_CASES = (
    Case("sub_blocks", (90, 40), (300, 280), 2, 3, 80, 5, 256, heads=(1, 2), queries=(7, 125)),
    Case("many_slots", (80,), (2500,), 1, 2, 136, 21, 128),
)


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


def expected(
    problem: Problem, chunk: Chunk, partials: dict[str, Tensor], shared: Tensor | None = None
) -> tuple[Expected, Expected]:
    """out [queries, heads, head_dim] and lse [heads, queries] of the chunk; `shared` as in stage_reference.merged."""
    by_slot = stage_reference.exponent_of_partials(problem, chunk, partials["value_exponent"])[..., None]
    if shared is not None:
        by_slot = by_slot.repeat(1, 1, 1, 1, problem.group_size)
        by_slot[..., 0, :] = torch.where(shared[..., None], partials["shared_exponent"][:, :, None], by_slot[..., 0, :])
    output, lse = torch.ldexp(partials["o_partial"].double(), by_slot[..., None]), partials["lse_partial"]

    def result(index: int) -> Expected:
        return stage_reference.expected(
            lambda a: stage_reference.merged(problem, chunk, output, lse, a, shared)[index], problem.q.dtype
        )

    return result(0), result(1)


def chunk_of(problem: Problem, chunk: Chunk) -> tuple[slice, slice]:
    """Query tokens and query heads."""
    group = problem.group_size
    return slice(chunk.query_begin, chunk.query_end), slice(chunk.head_begin * group, chunk.head_end * group)


def assert_merged(
    backend: str, problem: Problem, chunk: Chunk, partials: dict[str, Tensor], shared: Tensor | None = None
) -> None:
    """The chunk is right, and nothing is written outside it."""
    out, lse = run(backend, problem, chunk, partials)
    expected_out, expected_lse = expected(problem, chunk, partials, shared)
    queries, heads = chunk_of(problem, chunk)
    assert_close("out", out[queries, heads], expected_out)
    assert_close("lse", lse[heads, queries], expected_lse)
    for name, rest in (("out", out.transpose(0, 1)), ("lse", lse)):
        rest[heads, queries] = torch.nan
        assert rest.isnan().all(), f"{name}: written outside the chunk"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_reduce(backend: str, case: Case, dtype: torch.dtype) -> None:
    load_stages(backend, dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    assert_merged(backend, problem, chunk, make_partials(problem, chunk))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHARED_CASES, ids=str)
def test_shared_partials(case: Case, dtype: torch.dtype) -> None:
    """One partial for all shared blocks of a query, with exponents of its rows; its other sub-blocks are not read."""
    load_stages("cuda", dtype)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    problem.topk_idx[:, 20:23] = -1
    split = stage_reference.split(problem, chunk, min_queries=8)
    scattered_idx = problem.topk_idx.clone()
    scattered_idx[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end] = split.scattered
    problem = dataclasses.replace(problem, topk_idx=scattered_idx)
    partials = make_partials(problem, chunk)
    shared = split.scattered == SHARED_SLOT
    shares = shared.any(-1)
    assert shares.any() and not shares.all() and (split.scattered >= 0).any() and partials["o_partial"].shape[3] == 2

    generator = torch.Generator().manual_seed(1)
    for name, size in (("o_partial", 1.0), ("lse_partial", 3.0)):
        first_sub_block = partials[name][:, :, :, 0]
        assert first_sub_block[shared].isnan().all()
        draw = size * torch.randn(first_sub_block[shared].shape, generator=generator)
        first_sub_block[shared] = draw.to(first_sub_block)
    exponent = torch.full((*shares.shape, problem.group_size), POISON, dtype=torch.int32, device=shares.device)
    draw = torch.randint(-2, 4, exponent[shares].shape, generator=generator, dtype=torch.int32)
    exponent[shares] = draw.to(exponent.device)
    assert_merged("cuda", problem, chunk, {**partials, "shared_exponent": exponent}, shared)


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
