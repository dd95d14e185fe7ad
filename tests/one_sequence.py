"""Compressed attention of one sequence: problems, their layouts in memory, and a call of the public function."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reference import Inputs, Places, Results
from tolerances import Expected, expected_results
from torch import Tensor

from fsa.module.compressed_attention import compressed_attention

SPARE_WINDOWS = 3  # rows of compressed_k beyond the last window: full of NaN


@dataclass(frozen=True, eq=False)
class OneSequence(Inputs):
    """A problem of selected attention in which every query selects one block, which holds all windows."""

    kernel_size: int = 32
    kernel_stride: int = 16

    @functools.cached_property
    def places(self) -> Places:
        """Token p sees windows up to (p - (kernel_size - 1)) // kernel_stride."""
        token, window = (torch.arange(len(x), device=x.device) for x in (self.q, self.k))
        last = torch.div(token - (self.kernel_size - 1), self.kernel_stride, rounding_mode="floor")
        zero, no_sequence = torch.zeros_like(token), torch.zeros_like(window)
        return Places(zero, zero, last, no_sequence, window)

    @property
    def sizes(self) -> tuple[int, int]:
        """kernel_size and kernel_stride."""
        return self.kernel_size, self.kernel_stride


@dataclass(frozen=True)
class Case:
    """A sequence: `rows` of kernel_stride tokens, and a tail."""

    name: str
    rows: int = 6
    tail: int = 5
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 16
    kernel_size: int = 32
    kernel_stride: int = 16
    scale: float | None = None
    edit: Callable[[OneSequence], object] = lambda inputs: None  # changes values in place
    layout: Callable[[Tensor], Tensor] = lambda x: x  # of q, compressed_k, compressed_v, dout: other strides

    def inputs(self, dtype: torch.dtype, device: torch.device) -> OneSequence:
        """The problem; the same values in every run."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        total = self.kernel_size - 1 + self.kernel_stride * self.rows + self.tail
        windows, num_heads = self.rows + (self.tail > 0), self.num_kv_heads * self.group_size

        def randn(n: int, heads: int) -> Tensor:
            return torch.randn((n, heads, self.head_dim), generator=generator, dtype=torch.float64).to(dtype)

        inputs = OneSequence(
            q=randn(total, num_heads),
            k=randn(windows, self.num_kv_heads),
            v=randn(windows, self.num_kv_heads),
            topk_idx=torch.zeros((self.num_kv_heads, total, 1), dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, total], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, windows], dtype=torch.int32),
            block_size=2**30,
            softmax_scale=self.scale,
            causal=True,
            dout=randn(total, num_heads),
            dlse=torch.zeros((num_heads, total), dtype=torch.promote_types(dtype, torch.float32)),
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
        )
        self.edit(inputs)
        return inputs.map(lambda x: x.to(device))


@functools.lru_cache(maxsize=1)
def problem(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[OneSequence, dict[str, Expected]]:
    """A case's inputs, and what is expected."""
    inputs = case.inputs(dtype, device)
    return inputs, expected_results(inputs)


def with_spare_windows(x: Tensor) -> Tensor:
    """Rows beyond the last window, which nobody may read."""
    return torch.cat([x, x.new_full((SPARE_WINDOWS, *x.shape[1:]), torch.nan)])


def without_spare_windows(x: Tensor) -> Tensor:
    """What is left of a gradient, after a check that it is zero where nobody reads."""
    assert not x[-SPARE_WINDOWS:].any()
    return x[:-SPARE_WINDOWS]


def strided(x: Tensor) -> Tensor:
    """The same rows with a gap after each."""
    padded = x.new_full((*x.shape[:2], x.shape[2] + 24), torch.nan)
    padded[..., : x.shape[2]] = x
    return padded[..., : x.shape[2]]


def heads_first(x: Tensor) -> Tensor:
    """The same values, all tokens of a head together."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def run(inputs: OneSequence, backend: str = "auto", layout: Callable[[Tensor], Tensor] = lambda x: x) -> Results:
    """Both results and the gradients of out, by the public function."""
    q, k, v = (layout(x).requires_grad_() for x in (inputs.q, *map(with_spare_windows, (inputs.k, inputs.v))))
    out, lse = compressed_attention(
        q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        kernel_size=inputs.kernel_size, kernel_stride=inputs.kernel_stride, softmax_scale=inputs.softmax_scale,
        backend=backend,
    )  # fmt: skip
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), layout(inputs.dout))
    return Results(out.detach(), lse.detach(), dq, *map(without_spare_windows, (dk, dv)))
