"""Errors of backends and gradients; test_errors.py runs them and writes docs/errors.md."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from errors import Bad
from op_errors import qkv, right_arguments, zeros
from torch import Tensor

import fsa
from fsa import backends


def _on_backend(name: str, reason: str, **changes: Any) -> Callable[[], Any]:
    """A call on a machine where the backend is usable, or not for the reason."""

    def call() -> Any:
        found = backends.BackendStatus(name, not reason, reason)
        with mock.patch.object(backends, "status", return_value=found):
            return fsa.selected_attention(**(right_arguments() | changes), backend=name)

    return call


def _interpreted(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            return _on_backend("triton", "", **changes)()

    return call


def _second_derivative() -> None:
    q = zeros(128, 4, 16).requires_grad_()
    out = fsa.selected_attention(**(right_arguments() | {"q": q}))
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    dq.sum().backward()


def _backward_operator(**changes: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        a = right_arguments()
        lse = zeros(4, 128, dtype=torch.float32)
        given = {"out": a["q"], "lse": lse, "dout": a["q"], "dlse": lse} | changes
        return torch.ops.fsa.selected_attention_backward(
            given["dout"], given["dlse"], a["q"], a["k"], a["v"], given["out"], given["lse"],
            a["topk_idx"], a["cu_seqlens_q"], a["cu_seqlens_q"], 64, None, True,
        )  # fmt: skip

    return call


BACKENDS = [
    Bad(
        "`backend='cuda'` without a GPU",
        _on_backend("cuda", "no CUDA device"),
        RuntimeError,
        "backend must be usable for tensors on cpu, got backend='cuda': no CUDA device; use tensors on an NVIDIA "
        "GPU and an fsa that was installed where nvcc is found, or backend='auto'",
    ),
    Bad(
        "`backend='triton'` without triton",
        _on_backend("triton", "triton not installed"),
        RuntimeError,
        "backend must be usable for tensors on cpu, got backend='triton': triton not installed; use CUDA tensors with "
        "triton installed (or TRITON_INTERPRET=1 to try it on the CPU), or backend='auto'",
    ),
    Bad(
        "fp32 with `backend='cuda'`",
        _on_backend("cuda", "", **qkv(4, 2, 16, torch.float32)),
        ValueError,
        "q must be float16 or bfloat16 with backend='cuda', got float32; cast q, k and v",
    ),
    Bad(
        "bf16 under Triton's interpreter, which computes it wrong",
        _interpreted(**qkv(4, 2, 16, torch.bfloat16)),
        ValueError,
        "q must be float16 or float32 with backend='triton' under TRITON_INTERPRET=1, got bfloat16; cast q, k and v",
    ),
    Bad(
        "a second derivative",
        _second_derivative,
        NotImplementedError,
        "selected_attention must be differentiated once, got a second derivative; do not pass create_graph=True",
    ),
    Bad(
        "the backward operator with a dout of another shape",
        _backward_operator(dout=zeros(128, 4, 8)),
        ValueError,
        "dout must be float16 [128, 4, 16] like q, got float16 [128, 4, 8]; pass what the forward returned or its "
        "gradient",
    ),
    Bad(
        "the backward operator with an out of another dtype",
        _backward_operator(out=zeros(128, 4, 16, dtype=torch.float32)),
        ValueError,
        "out must be float16 [128, 4, 16] like q, got float32 [128, 4, 16]; pass what the forward returned or its "
        "gradient",
    ),
    Bad(
        "the backward operator with a transposed lse",
        _backward_operator(lse=zeros(128, 4, dtype=torch.float32)),
        ValueError,
        "lse must be float32 [num_heads, total_q] = [4, 128], got float32 [128, 4]; pass what the forward returned or "
        "its gradient",
    ),
    Bad(
        "the backward operator with a dlse in half precision",
        _backward_operator(dlse=zeros(4, 128, dtype=torch.float16)),
        ValueError,
        "dlse must be float32 [num_heads, total_q] = [4, 128], got float16 [4, 128]; pass what the forward returned or "
        "its gradient",
    ),
]
