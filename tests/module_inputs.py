"""Inputs of the module's parts, the same in every run."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fsa.module.compression import find_windows

CPU = torch.device("cpu")


def cu_seqlens_of(lengths: tuple[int, ...], device: torch.device = CPU) -> Tensor:
    """Prefix sums."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Tensor:
    """Normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make_arguments(
    lengths: tuple[int, ...] = (50, 9, 0, 70),
    dtype: torch.dtype = torch.float64,
    head_dim: int = 8,
    requires_grad: bool = True,
    device: torch.device = CPU,
) -> tuple[Any, ...]:
    """Arguments of the operator: 4 query heads on 2 KV heads, windows of 16 tokens, one every 8, and padding."""
    total = sum(lengths)
    cu_seqlens = cu_seqlens_of(lengths, device)
    windows = find_windows(cu_seqlens, total, 16, 8)
    n = total // 8
    tensors = (randn(total, 4, head_dim), randn(n, 2, head_dim, seed=1), randn(n, 2, head_dim, seed=2))
    q, k, v = (x.to(device, dtype).requires_grad_(requires_grad) for x in tensors)
    return q, k, v, cu_seqlens, windows.cu_seqlens, 16, 8, None


def call_op(arguments: tuple[Any, ...], name: str = "_compressed_attention_reference") -> tuple[Tensor, Tensor]:
    """out and lse."""
    return getattr(torch.ops.fsa, name).default(*arguments)  # type: ignore[no-any-return]
