"""What the stage tests share: the stages of a backend, the problems they are tried on, and poisoned buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from harness import DEVICE, skip_unless_usable
from torch import Tensor

import fsa.buffers
from fsa import backends
from fsa.problem import Chunk, ChunkGrid, Problem

BACKENDS = ("triton", "cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
POISON = -7  # of integer buffers; floating-point ones are filled with NaN
HOSTILE_IDS = (-1, -2, -(2**31), 2**31 - 1, 2**31 // 32, 10**6)


def load_stages(backend: str, dtype: torch.dtype | None = None) -> ModuleType:
    """The stages module of a backend; skips the test where it cannot run, or not with this dtype."""
    skip_unless_usable(backend)
    if dtype is not None and dtype not in backends.contract(backend)[0]:
        pytest.skip(f"{backend} does not take {dtype} here")
    return backends.stages(backend)


@dataclass(frozen=True)
class Case:
    """Sizes of a problem, and which part of it is the chunk that the stages get."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    num_kv_heads: int
    group_size: int
    head_dim: int
    topk: int
    block_size: int
    causal: bool = True
    popular: bool = False  # every query selects block 0 in its first slot
    heads: tuple[int, int] | None = None  # KV heads of the chunk; None: all
    queries: tuple[int, int] | None = None  # query tokens of the chunk; None: all

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("ragged", (37, 0, 1, 3, 20), (37, 0, 5, 3, 90), 2, 3, 24, 5, 32),
    Case("full", (1, 30), (70, 33), 1, 1, 64, 7, 64, causal=False),
    Case("sub_blocks", (40,), (300,), 1, 2, 80, 2, 256),
    Case("wide_head", (20,), (140,), 1, 16, 256, 1, 128),
    Case("many_slots", (25,), (200,), 1, 2, 136, 21, 64),
    Case("popular", (90, 110), (90, 150), 1, 1, 8, 2, 128, popular=True),
    Case("chunk", (50, 60), (50, 75), 3, 2, 16, 16, 32, heads=(1, 3), queries=(37, 90)),
)
# The backward adds to dk and dv where the queries come in several chunks.
CASES_AND_ACCUMULATE = [(case, accumulate) for accumulate in (False, True) for case in CASES[-2 * accumulate :]]


def make_problem(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """A problem with hostile and duplicate ids among valid ones; q, k and v are not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (case.lengths_q, case.lengths_k)
    )
    total_q, total_k = sum(case.lengths_q), sum(case.lengths_k)
    most_blocks = -(-max(case.lengths_k) // case.block_size)
    shape = (case.num_kv_heads, total_q, case.topk)
    topk_idx = torch.randint(0, most_blocks + 1, shape, generator=generator, dtype=torch.int32)
    hostile = torch.tensor(HOSTILE_IDS)[torch.randint(len(HOSTILE_IDS), shape, generator=generator)].int()
    topk_idx = torch.where(torch.rand(shape, generator=generator) < 0.15, hostile, topk_idx)
    if case.popular:
        topk_idx[:, :, 0] = 0
    return Problem(
        q=strided_rows(total_q, case.num_kv_heads * case.group_size, case.head_dim, dtype, generator),
        k=strided_rows(total_k, case.num_kv_heads, case.head_dim, dtype, generator),
        v=strided_rows(total_k, case.num_kv_heads, case.head_dim, dtype, generator),
        topk_idx=topk_idx.to(DEVICE),
        cu_seqlens_q=cu_seqlens_q.to(DEVICE),
        cu_seqlens_k=cu_seqlens_k.to(DEVICE),
        block_size=case.block_size,
        softmax_scale=case.head_dim**-0.5,
        causal=case.causal,
    )


def make_chunk(case: Case) -> Chunk:
    """The part of the case's problem that the stages get."""
    return Chunk(*(case.heads or (0, case.num_kv_heads)), *(case.queries or (0, sum(case.lengths_q))))


def alone(chunk: Chunk) -> ChunkGrid:
    """The chunk as the only one that is planned."""
    return ChunkGrid(
        chunk.head_begin, chunk.head_end, chunk.query_begin, chunk.query_end, chunk.num_heads, chunk.num_queries
    )


def strided_rows(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal random [tokens, heads, head_dim] as a view into rows that are 8 elements longer; the gaps are NaN."""
    rows = torch.full((tokens, heads, head_dim + 8), torch.nan, dtype=dtype)
    rows[..., :head_dim] = torch.randn(tokens, heads, head_dim, generator=generator)
    return rows.to(DEVICE)[..., :head_dim]


def poisoned(buffers: fsa.buffers.Buffers) -> dict[str, Tensor]:
    """The buffers, filled with what no stage may take for a result."""
    return {
        name: torch.full(
            buffer.shape, torch.nan if buffer.dtype.is_floating_point else POISON, dtype=buffer.dtype, device=DEVICE
        )
        for name, buffer in buffers.items()
    }


MARGIN = 1024  # elements; a multiple of what kernels align to


def carved(buffers: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of poisoned buffers that lie inside larger tensors, as poisoned; and these, for assert_margins."""
    wholes = {
        name: x.new_full((x.numel() + 2 * MARGIN,), torch.nan if x.is_floating_point() else POISON)
        for name, x in buffers.items()
    }
    return {name: whole[MARGIN:-MARGIN].view(buffers[name].shape) for name, whole in wholes.items()}, wholes


def assert_margins(wholes: dict[str, Tensor]) -> None:
    """Nothing was written beside the buffers."""
    for name, whole in wholes.items():
        for margin in (whole[:MARGIN], whole[-MARGIN:]):
            kept = margin.isnan() if margin.is_floating_point() else margin == POISON
            assert kept.all(), f"{name}: written out of bounds"


def record_shared_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Will hold, of all calls of forward_shared to come, how many blocks the query tiles share."""
    stages, counts = backends.stages("cuda"), []
    forward_shared: Callable[..., None] = stages.forward_shared

    def recording(problem: Problem, chunk: Chunk, **buffers: Tensor) -> None:
        counts.append(int(buffers["shared_counts"].sum()))
        forward_shared(problem, chunk, **buffers)

    monkeypatch.setattr(stages, "forward_shared", recording)
    return counts


def forward_buffers(problem: Problem, chunk: Chunk) -> dict[str, Tensor]:
    """o_partial, lse_partial and value_exponent of a chunk, poisoned."""
    sizes = fsa.buffers.Sizes.of(problem)
    return poisoned(fsa.buffers.forward_buffers(sizes, chunk.num_heads, chunk.num_queries))


def backward_buffers(problem: Problem, chunk: Chunk, edges_per_item: int) -> dict[str, Tensor]:
    """dq_partial and dkv_pieces of a chunk, poisoned."""
    sizes = fsa.buffers.Sizes.of(problem)
    return poisoned(fsa.buffers.backward_buffers(sizes, chunk.num_heads, chunk.num_queries, edges_per_item))
