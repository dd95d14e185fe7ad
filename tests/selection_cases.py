"""Problems of block selection, their scores in float64, and what a selection must be: for tests and sanitize.py."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import DEVICE, HAS_GPU
from torch import Tensor

from fsa.module.selection import select_blocks

RATIOS = (4, 8, 16)  # strides of a block, of which CUDA has kernels
DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float16, torch.float32)
SPARE_WINDOWS = 3  # rows of compressed_k beyond the last window: full of NaN


@dataclass(frozen=True)
class Case:
    """A problem by its shape and what is changed afterwards."""

    name: str
    lengths: tuple[int, ...]
    num_kv_heads: int = 1
    group_size: int = 2
    head_dim: int = 32
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 4
    init_blocks: int = 1
    local_blocks: int = 2
    edit: Callable[[Tensor, Tensor], object] = lambda q, k: None  # changes q and k in place
    dtype: torch.dtype = DTYPES[0]


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of select_blocks, and the scores that it should see."""

    case: Case
    q: Tensor
    k: Tensor
    lse: Tensor
    cu_seqlens: Tensor
    compressed_cu_seqlens: Tensor
    scores: Tensor  # [num_kv_heads, total, num_blocks], float64
    error: Tensor  # what fp32 arithmetic may do to them
    own_block: Tensor  # [total]

    def select(self, backend: str) -> Tensor:
        """topk_idx of the kernels of a backend."""
        names = ("kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks")
        options = {name: getattr(self.case, name) for name in names}
        tensors = (self.q, self.k, self.lse, self.cu_seqlens, self.compressed_cu_seqlens)
        return select_blocks(*(x.to(DEVICE) for x in tensors), **options, backend=backend).cpu()


def make(case: Case) -> Problem:
    """The problem; the same values in every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    windows = [max(0, (n - case.kernel_size) // case.kernel_stride + 1) for n in case.lengths]
    total, num_heads = sum(case.lengths), case.num_kv_heads * case.group_size
    q = torch.randn((total, num_heads, case.head_dim), generator=generator).to(case.dtype)
    k = torch.randn((sum(windows) + SPARE_WINDOWS, case.num_kv_heads, case.head_dim), generator=generator).to(
        case.dtype
    )
    case.edit(q, k)
    k[sum(windows) :] = torch.nan
    num_blocks = -(-max(case.lengths) // case.block_size)
    lse = torch.full((num_heads, total), -torch.inf)
    scores = torch.zeros((case.num_kv_heads, total, num_blocks), dtype=torch.float64)
    error = torch.zeros_like(scores)
    own_block = torch.cat([torch.arange(n) // case.block_size for n in case.lengths])
    begin = first = 0
    for n, w in zip(case.lengths, windows, strict=True):
        tokens, keys = slice(begin, begin + n), slice(first, first + w)
        if w:
            found = _scores_of_sequence(case, q[tokens].double(), k[keys].double(), num_blocks)
            scores[:, tokens], error[:, tokens], lse[:, tokens] = found
        begin, first = begin + n, first + w
    return Problem(
        case,
        q,
        k,
        lse,
        torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(windows)], dtype=torch.int32),
        scores,
        error,
        own_block,
    )


def _scores_of_sequence(case: Case, q: Tensor, k: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and their error [num_kv_heads, n, num_blocks], lse [num_heads, n] of one sequence, term by term."""
    scale, (n, w) = case.head_dim**-0.5, (q.shape[0], k.shape[0])
    k = k.repeat_interleave(case.group_size, 1)
    logits = torch.einsum("ihd,whd->hiw", q, k) * scale
    sizes = torch.einsum("ihd,whd->hiw", q.abs(), k.abs()) * scale
    last_token = torch.arange(w) * case.kernel_stride + case.kernel_size - 1
    visible = torch.arange(n)[:, None] >= last_token
    lse = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
    probs = torch.where(visible, (logits - lse[..., None]).exp(), 0)
    overlap = torch.zeros(w, num_blocks, dtype=torch.float64)
    for window, chunk in itertools.product(range(w), range(case.kernel_size // case.kernel_stride)):
        overlap[window, (window + chunk) * case.kernel_stride // case.block_size] += 1
    u = torch.finfo(torch.float32).eps / 2
    # exp errs relatively by as much as its argument absolutely, each head summed rounds once; what underflows is zero
    error = 4 * u * probs * (2 + case.group_size + sizes + lse.abs()[..., None].nan_to_num(posinf=0)) + 1e-37
    by_group = (x.unflatten(0, (case.num_kv_heads, -1)).sum(1) @ overlap for x in (probs, error))
    return (*by_group, lse.float())


def assert_selected(topk_idx: Tensor, problem: Problem) -> None:
    """Rows as the contract has them, and no block left out that is clearly better than one that was taken."""
    case, own = problem.case, problem.own_block[:, None]
    num_blocks = problem.scores.shape[-1]
    block = torch.arange(num_blocks)
    used = topk_idx >= 0
    assert topk_idx.shape == (case.num_kv_heads, problem.q.shape[0], case.topk) and topk_idx.dtype == torch.int32
    assert (used.sum(-1) == (problem.own_block + 1).clamp(max=case.topk)).all()
    assert (used[..., :-1] | ~used[..., 1:]).all(), "unused slots come last"
    assert (topk_idx <= own).all() and (topk_idx >= -1).all()
    assert ((topk_idx.diff() > 0) | ~used[..., 1:]).all(), "ids ascend"

    taken = torch.zeros((*topk_idx.shape[:2], num_blocks + 1), dtype=torch.bool)
    taken = taken.scatter(-1, torch.where(used, topk_idx, num_blocks).long(), True)[..., :num_blocks]
    forced = ((block < case.init_blocks) | (block > own - case.local_blocks)) & (block <= own)
    assert taken[forced.expand_as(taken)].all(), "forced blocks are taken"
    # -inf and +inf: no block of the kind
    low, high = problem.scores - problem.error, problem.scores + problem.error
    worst_taken = torch.where(taken & ~forced, high, torch.inf).amin(-1)
    best_left = torch.where(~taken & (block <= own), low, -torch.inf).amax(-1)
    assert (best_left <= worst_taken).all(), f"at {(best_left > worst_taken).nonzero()[0].tolist()}"


def large_logits(q: Tensor, k: Tensor) -> None:
    """Logits of about +-10^4."""
    q.mul_(100)
    k.mul_(100)


CASES = [
    Case("one_sequence", (700,), num_kv_heads=2),
    Case("ragged", (0, 1, 3, 31, 64, 65, 400, 0, 290, 3), num_kv_heads=2),
    Case("many_blocks", (2300,) if HAS_GPU else (800,), block_size=32, topk=9, group_size=1, head_dim=16),
    Case("search_from_maxima", (2060,), kernel_stride=32, block_size=32, topk=9, group_size=1, head_dim=16),
    Case("large_topk", (700,), block_size=32, topk=16, local_blocks=1),
    Case("group_size_1", (500,), group_size=1),
    Case("group_size_3", (500,), group_size=3),
    Case("group_size_16", (300,), group_size=16, block_size=32, head_dim=16),
    Case("head_dim_40", (500,), head_dim=40),
    Case("head_dim_128", (500,), head_dim=128),
    Case("head_dim_192", (400,), head_dim=192, group_size=1),
    Case("no_overlap", (500,), kernel_size=16),
    Case("windows_as_long_as_blocks", (500,), kernel_size=64),
    Case("windows_of_four_strides", (500,), kernel_size=32, kernel_stride=8),
    Case("one_window_a_block", (500,), kernel_size=32, kernel_stride=32, block_size=32),
    Case("no_forced_blocks", (500,), init_blocks=0, local_blocks=0, topk=3),
    Case("all_forced", (500,), init_blocks=2, local_blocks=2),
    Case("large_logits", (500,), edit=large_logits),
]
CUDA_CASES = [
    *(case for case in CASES if case.block_size // case.kernel_stride in RATIOS),
    Case("blocks_of_8_strides", (900,), block_size=128, group_size=3, head_dim=64),
    Case("blocks_of_16_strides", (900, 70), block_size=256, kernel_size=64, topk=3, local_blocks=1),
    Case("head_dim_96", (300,), head_dim=96),
    Case("head_dim_256", (500,), head_dim=256, kernel_stride=8, num_kv_heads=2),
    Case(
        "head_dim_256_blocks_of_16_strides",
        (600,),
        head_dim=256,
        block_size=256,
        kernel_size=256,
        topk=2,
        local_blocks=1,
    ),
    Case("head_dim_8", (300,), head_dim=8),
    Case("group_size_64", (200,), group_size=64, head_dim=16),
    Case("topk_512", (800,), topk=512, kernel_size=8, kernel_stride=8, block_size=32, group_size=1),
    Case("short_sequences", (70,) * 12, num_kv_heads=3, topk=2, init_blocks=0, local_blocks=1),
    Case("several_tiles_of_windows", (2300,), kernel_size=8, kernel_stride=8, block_size=32, topk=6, group_size=1),
    # The best 29 of the blocks that scores decide on, more than lanes that have any; and more slots than lanes
    Case("slots_as_many_as_lanes", (1700,), kernel_size=8, kernel_stride=8, block_size=32, topk=32, group_size=1),
    Case("more_slots_than_lanes", (1700,), kernel_size=16, kernel_stride=8, block_size=32, topk=45, group_size=1),
]
