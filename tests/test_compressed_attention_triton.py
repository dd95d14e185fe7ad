"""The Triton kernels of the compressed branch against dense attention in float64, forward and backward."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from harness import DEVICE, HAS_GPU, assert_same_bits, skip_unless_usable
from reference import Inputs, Places, Results
from tolerances import Expected, assert_results, expected_results
from torch import Tensor

pytest.importorskip("triton")

from fsa.module import triton_compressed_attention_dkv  # noqa: E402
from fsa.module.compressed_attention import compressed_attention  # noqa: E402

KERNEL_SIZE, KERNEL_STRIDE = 32, 16
DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float16, torch.float32)
SPARE_WINDOWS = 3  # rows of compressed_k beyond the last window: full of NaN


@dataclass(frozen=True, eq=False)
class Compressed(Inputs):
    """A problem of selected attention in which every query selects one block, which holds all windows of its sequence.

    `k` and `v` are the windows, `cu_seqlens_k` counts them; a query sees as many as are complete.
    """

    kernel_size: int = KERNEL_SIZE
    kernel_stride: int = KERNEL_STRIDE

    @functools.cached_property
    def places(self) -> Places:
        """Where tokens and windows stand, by cu_seqlens."""
        q_ends, w_ends = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        rows = []
        for sequence, (begin, end) in enumerate(itertools.pairwise(q_ends)):
            for place in range(end - begin):
                seen = min(
                    (place - self.kernel_size + 1) // self.kernel_stride + 1, w_ends[sequence + 1] - w_ends[sequence]
                )
                rows.append((sequence, w_ends[sequence], seen - 1 if place >= self.kernel_size - 1 else -1))
        keys = [(b, w) for b, (begin, end) in enumerate(itertools.pairwise(w_ends)) for w in range(end - begin)]
        query, key = (
            torch.tensor(x, device=self.q.device).reshape(-1, n).unbind(-1) for x, n in ((rows, 3), (keys, 2))
        )
        return Places(*query, *key)


def windows_of(lengths: tuple[int, ...], kernel_size: int, kernel_stride: int) -> list[int]:
    """Complete windows of each sequence."""
    return [max(0, (n - kernel_size) // kernel_stride + 1) for n in lengths]


@dataclass(frozen=True)
class Case:
    """A problem by its shape, and what is changed afterwards."""

    name: str
    lengths: tuple[int, ...]
    num_kv_heads: int = 1
    group_size: int = 2
    head_dim: int = 64
    kernel_size: int = KERNEL_SIZE
    kernel_stride: int = KERNEL_STRIDE
    edit: Callable[[Compressed], object] = lambda inputs: None  # changes values in place
    layout: Callable[[Tensor], Tensor] = lambda x: x  # of q, compressed_k, compressed_v, dout: other strides

    def inputs(self, dtype: torch.dtype) -> Compressed:
        """The problem; the same values in every run."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        windows = windows_of(self.lengths, self.kernel_size, self.kernel_stride)
        total, num_windows, num_heads = sum(self.lengths), sum(windows), self.num_kv_heads * self.group_size

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        inputs = Compressed(
            q=randn(total, num_heads, self.head_dim),
            k=randn(num_windows, self.num_kv_heads, self.head_dim),
            v=randn(num_windows, self.num_kv_heads, self.head_dim),
            topk_idx=torch.zeros((self.num_kv_heads, total, 1), dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, *itertools.accumulate(windows)], dtype=torch.int32),
            block_size=2**30,
            softmax_scale=None,
            causal=True,
            dout=randn(total, num_heads, self.head_dim),
            dlse=randn(num_heads, total).float(),
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
        )
        self.edit(inputs)
        return inputs.map(lambda x: x.to(DEVICE))


def large_logits(inputs: Compressed) -> None:
    """Logits of about +-10^4."""
    inputs.q.mul_(100)
    inputs.k.mul_(100)


def nan_windows(inputs: Compressed) -> None:
    """A window that few queries see, beside queries that do not see it; another in the middle of a sequence."""
    for window in (1, inputs.k.shape[0] - 1):
        inputs.k[window, 0, 3] = torch.nan
        inputs.v[window, 0, 5] = torch.nan


def infinite_values(inputs: Compressed) -> None:
    """Values of both infinities in the last windows."""
    inputs.v[-1, 0, 5] = torch.inf
    inputs.v[-2, 0, 5] = -torch.inf
    inputs.v[-2, 0, 6] = -torch.inf


def nan_queries(inputs: Compressed) -> None:
    """A query that sees some windows of its tile."""
    inputs.q[70, 0, 3] = torch.nan


def strided(x: Tensor) -> Tensor:
    """The same rows with a gap after each."""
    padded = x.new_full((*x.shape[:2], x.shape[2] + 24), torch.nan)
    padded[..., : x.shape[2]] = x
    return padded[..., : x.shape[2]]


CASES = [
    Case("one_sequence", (300,)),
    Case("ragged", (0, 1, 3, 31, 32, 33, 100, 0, 150, 3), num_kv_heads=2),
    Case("shorter_than_a_window", (5, 31)),
    Case("many_windows", (2200,), group_size=1, head_dim=16),
    Case("group_size_1", (150, 80), group_size=1),
    Case("group_size_3", (150, 80), group_size=3),
    Case("group_size_16", (90, 50), group_size=16, head_dim=16),
    Case("head_dim_40", (150, 80), head_dim=40),
    Case("head_dim_128", (150,), head_dim=128, group_size=1),
    Case("head_dim_192", (150,), head_dim=192, group_size=1),
    Case("head_dim_256", (150,), head_dim=256, group_size=1),
    Case("no_overlap", (150, 40), kernel_size=8, kernel_stride=8),
    Case("windows_of_four_strides", (150, 70), kernel_size=32, kernel_stride=8),
    Case("odd_windows", (150, 70), kernel_size=21, kernel_stride=7),
    Case("large_logits", (150, 80), edit=large_logits),
    Case("nan_windows", (150, 80), edit=nan_windows),
    Case("infinite_values", (150, 80), edit=infinite_values),
    Case("nan_queries", (150, 80), edit=nan_queries),
    Case("strided", (150, 80), num_kv_heads=2, layout=strided),
]


@functools.lru_cache(maxsize=1)
def problem(case: Case, dtype: torch.dtype) -> tuple[Compressed, dict[str, Expected]]:
    """A case's inputs on the device of the tests, and what is expected."""
    inputs = case.inputs(dtype)
    return inputs, expected_results(inputs)


def with_spare_windows(x: Tensor) -> Tensor:
    """Rows beyond the last window, which nobody may read."""
    return torch.cat([x, x.new_full((SPARE_WINDOWS, *x.shape[1:]), torch.nan)])


def attend(inputs: Compressed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of the Triton kernels."""
    skip_unless_usable("triton")
    return compressed_attention(
        q,
        k,
        v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        kernel_size=inputs.kernel_size,
        kernel_stride=inputs.kernel_stride,
        backend="triton",
    )


def run(inputs: Compressed, layout: Callable[[Tensor], Tensor] = lambda x: x) -> Results:
    """Both results and all gradients; checks that gradients of spare windows are zero."""
    k, v = (with_spare_windows(x) for x in (inputs.k, inputs.v))
    q, k, v = (layout(x).requires_grad_() for x in (inputs.q, k, v))
    out, lse = attend(inputs, q, k, v)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (layout(inputs.dout), inputs.dlse))
    assert not dk[-SPARE_WINDOWS:].any() and not dv[-SPARE_WINDOWS:].any()
    return Results(out.detach(), lse.detach(), dq, dk[:-SPARE_WINDOWS], dv[:-SPARE_WINDOWS])


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")  # infinity - infinity in NumPy
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results(case: Case) -> None:
    inputs, expected = problem(case, DTYPES[0])
    assert_results(run(inputs, case.layout), expected)


@pytest.mark.parametrize("case", CASES[1:2], ids=lambda case: case.name)
def test_results_in_another_dtype(case: Case) -> None:
    inputs, expected = problem(case, DTYPES[1])
    assert_results(run(inputs, case.layout), expected)


def test_expanded_dout() -> None:
    """`.sum().backward()` hands over a gradient with strides of zero; lse has none."""
    inputs = Case("expanded", (70,)).inputs(DTYPES[0])
    expanded = inputs.replace(dout=torch.ones_like(inputs.dout), dlse=torch.zeros_like(inputs.dlse))
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = attend(inputs, q, k, v)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert_results(Results(out.detach(), lse.detach(), *gradients), expected_results(expanded))


def test_same_bits_every_time() -> None:
    inputs = Case("deterministic", (150, 80)).inputs(DTYPES[0])
    assert_same_bits(run(inputs), run(inputs))


def test_no_tokens_and_no_windows() -> None:
    """Empty tensors launch nothing that fails."""
    assert run(Case("no_tokens", (0, 0)).inputs(DTYPES[0])).dq.shape[0] == 0
    inputs = Case("no_windows", (7,)).inputs(DTYPES[0])
    assert inputs.k.shape[0] == 0
    out, lse = attend(inputs, inputs.q.requires_grad_(), inputs.k, inputs.v)
    assert not out.any() and torch.isneginf(lse).all()
    assert not torch.autograd.grad(out.sum(), inputs.q)[0].any()


def test_parts_are_bounded() -> None:
    """dK and dV in parts stay within their limit, whatever the shape."""
    for max_windows, num_kv_heads, head_dim in ((4095, 4, 128), (8191, 8, 128), (100, 1, 64), (10**6, 8, 128)):
        k = torch.empty((max_windows, num_kv_heads, head_dim), device="meta")
        splits = triton_compressed_attention_dkv.number_of_splits(k, 16 * max_windows, 4, 64, 128)
        assert splits == 1 or 2 * 4 * splits * k.numel() <= triton_compressed_attention_dkv.DKV_PARTS_BYTES
