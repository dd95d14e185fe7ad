"""What forward_main leaves, and how the stages that merge it are compared with their definition."""

from __future__ import annotations

import stage_reference
import torch
from reference import EXACT
from stages import forward_buffers
from tolerances import Expected, assert_close
from torch import Tensor

from fsa.problem import Chunk, Problem


def make_partials(problem: Problem, chunk: Chunk) -> dict[str, Tensor]:
    """What forward_main would leave, in poisoned buffers."""
    buffers = forward_buffers(problem, chunk)
    tile_k = problem.block_size // buffers["o_partial"].shape[3]
    attended = stage_reference.selection(problem, chunk, tile_k).attended
    exponents, defined = stage_reference.value_exponent(problem, chunk, tile_k)
    exponents += torch.arange(exponents.shape[1], device=exponents.device)[:, None] % 3  # merging only undoes them
    output = stage_reference.partial_output(problem, chunk, tile_k, EXACT)
    by_slot = stage_reference.exponent_of_partials(problem, chunk, exponents)
    output *= torch.ldexp(torch.ones_like(by_slot, dtype=torch.float64), -by_slot)[..., None, None]
    lse = stage_reference.partial_lse(problem, chunk, tile_k, EXACT)
    buffers["o_partial"][attended] = output[attended].to(buffers["o_partial"].dtype)
    buffers["lse_partial"][attended] = lse[attended].float()
    buffers["value_exponent"][defined] = exponents[defined]
    return buffers


def unscaled(problem: Problem, chunk: Chunk, partials: dict[str, Tensor]) -> Tensor:
    """o_partial [H, Q, T, U, G, D] as it was before it was divided by powers of two."""
    by_slot = stage_reference.exponent_of_partials(problem, chunk, partials["value_exponent"])
    return torch.ldexp(partials["o_partial"].double(), by_slot[..., None, None])


def empty_results(problem: Problem) -> tuple[Tensor, Tensor]:
    """out and lse of the whole problem, NaN."""
    out = torch.full(problem.q.shape, torch.nan, dtype=problem.q.dtype, device=problem.q.device)
    return out, torch.full((problem.num_heads, problem.total_q), torch.nan, device=problem.q.device)


def chunk_of(problem: Problem, chunk: Chunk) -> tuple[slice, slice]:
    """Query tokens and query heads."""
    group = problem.group_size
    return slice(chunk.query_begin, chunk.query_end), slice(chunk.head_begin * group, chunk.head_end * group)


def assert_results(
    problem: Problem, chunk: Chunk, results: tuple[Tensor, Tensor], expected: tuple[Expected, Expected]
) -> None:
    """out and lse of the chunk are right, and nothing is written outside it."""
    out, lse = results
    queries, heads = chunk_of(problem, chunk)
    assert_close("out", out[queries, heads], expected[0])
    assert_close("lse", lse[heads, queries], expected[1])
    for name, rest in (("out", out.transpose(0, 1)), ("lse", lse)):
        rest[heads, queries] = torch.nan
        assert rest.isnan().all(), f"{name}: written outside the chunk"
