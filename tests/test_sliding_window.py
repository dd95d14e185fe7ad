"""The sliding window, and softmax_scale of both branches that have one of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import nsa_reference
import pytest
import torch
from harness import DEVICE, HAS_GPU
from module_inputs import cu_seqlens_of, make_arguments, randn
from torch import Tensor

from fsa.module.compressed_attention import compressed_attention
from fsa.module.sliding_window import sliding_window_attention


@pytest.mark.parametrize("window_size", [1, 2, 24, 64, 500])
@pytest.mark.parametrize("lengths", [(50, 0, 1, 33), (97,)])
def test_sliding_window(lengths: tuple[int, ...], window_size: int) -> None:
    device, dtype = DEVICE, torch.float16 if HAS_GPU else torch.float64
    tensors = [randn(sum(lengths), heads, 16, seed=heads, dtype=dtype, device=device) for heads in (6, 2, 3)]
    q, k, v = tensors[0], tensors[1], tensors[2][:, :2]
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    cu_seqlens = cu_seqlens_of(lengths, device)
    out = sliding_window_attention(*inputs, cu_seqlens, window_size=window_size)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = []
    for part in zip(*(x.split(lengths) for x in exact), strict=True):
        position = torch.arange(len(part[0]), device=device)
        behind = position[:, None] - position
        wanted.append(nsa_reference.attend(*part, ((behind >= 0) & (behind < window_size))[None])[0])
    dout = randn(*out.shape, seed=9, dtype=dtype, device=device)
    gradients = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(torch.cat(wanted), exact, dout.double())
    tolerance = 5e-3 if HAS_GPU else 1e-9
    for a, b in zip((out, *gradients), (torch.cat(wanted), *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_sliding_window_outside_of_sequences() -> None:
    x = randn(10, 1, 8)
    out = sliding_window_attention(x, x, x, torch.tensor([2, 6], dtype=torch.int32), window_size=3)
    assert (out == 0).flatten(1).all(1).tolist() == [True, True, False, False, False, False, True, True, True, True]


def test_scale() -> None:
    """softmax_scale of the parts; None is head_dim ** -0.5."""
    q, k, v, cu_seqlens, compressed_cu_seqlens, *_ = make_arguments(requires_grad=False)
    windows: dict[str, Any] = {"kernel_size": 16, "kernel_stride": 8}
    compressed = functools.partial(compressed_attention, q, k, v, cu_seqlens, compressed_cu_seqlens, **windows)
    x = randn(q.shape[0], 2, 8)
    sliding = functools.partial(sliding_window_attention, q, x, x, cu_seqlens, window_size=5)
    parts: tuple[Callable[..., Tensor], ...] = (lambda **scale: compressed(**scale)[0], sliding)
    for part in parts:
        assert torch.equal(part(), part(softmax_scale=8**-0.5))
        assert not torch.allclose(part(), part(softmax_scale=1.0))
