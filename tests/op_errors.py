"""Errors of `selected_attention`, its backends and workspace; test_errors.py runs them and writes docs/errors.md."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from errors import Bad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fsa
from fsa import backends, workspace
from fsa.workspace import Sizes


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def right_arguments() -> dict[str, Any]:
    """A call that is right: 128 tokens, 4 query heads on 2 KV heads, head_dim 16, 4 slots."""
    return {
        "q": _zeros(128, 4, 16),
        "k": _zeros(128, 2, 16),
        "v": _zeros(128, 2, 16),
        "topk_idx": _zeros(2, 128, 4, dtype=torch.int32),
        "cu_seqlens_q": _ints(0, 128),
    }


@dataclass(frozen=True)
class _Attend:
    """A call of the op with some arguments changed."""

    changes: dict[str, Any]

    def __call__(self) -> Any:
        return fsa.selected_attention(**(right_arguments() | self.changes))


def _attend(**changes: Any) -> _Attend:
    return _Attend(changes)


def _zeros(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _fake(device: str) -> Tensor:
    with FakeTensorMode():
        return torch.empty(128, 4, 16, device=device)


def _qkv(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    key = _zeros(128, kv_heads, head_dim, dtype=dtype)
    return {"q": _zeros(128, heads, head_dim, dtype=dtype), "k": key, "v": key}


TYPES = [
    Bad(
        "a list instead of a tensor",
        _attend(q=[1.0]),
        TypeError,
        "q must be a torch.Tensor, got list; convert it to a tensor",
    ),
    Bad(
        "`block_size=64.0`",
        _attend(block_size=64.0),
        TypeError,
        "block_size must be an int, got float; pass one of 32, 64, 128, 256",
    ),
    Bad(
        "`softmax_scale='auto'`",
        _attend(softmax_scale="auto"),
        TypeError,
        "softmax_scale must be a float or None, got str; pass None for head_dim ** -0.5",
    ),
    Bad("`causal=1`", _attend(causal=1), TypeError, "causal must be a bool, got int; pass True or False"),
    Bad(
        "`backend='cudnn'`",
        _attend(backend="cudnn"),
        ValueError,
        "backend must be one of 'auto', 'cuda', 'triton', 'reference', got 'cudnn'; pass one of them",
    ),
    Bad(
        "tensors on another kind of device",
        lambda: fsa.selected_attention(**(right_arguments() | {"q": _fake("mps")})),
        ValueError,
        "q must be on a CUDA or CPU device, got mps:0; move the tensors there",
    ),
]

QKV = [
    Bad(
        "a batch dimension in q",
        _attend(q=_zeros(1, 128, 4, 16)),
        ValueError,
        "q must be [total_q, num_heads, head_dim], got [1, 128, 4, 16]; pack all sequences along dimension 0, "
        "without a "
        "batch dimension",
    ),
    Bad(
        "a batch dimension in k",
        _attend(k=_zeros(1, 128, 2, 16)),
        ValueError,
        "k must be [total_k, num_kv_heads, head_dim], got [1, 128, 2, 16]; pack all sequences along dimension 0, "
        "without a batch dimension",
    ),
    Bad(
        "integer q",
        _attend(**_qkv(4, 2, 16, torch.int32)),
        ValueError,
        "q must be float16, bfloat16, float32 or float64 with backend='auto', got int32; cast q, k and v",
    ),
    Bad(
        "k in another dtype than q",
        _attend(k=_zeros(128, 2, 16, dtype=torch.float32)),
        ValueError,
        "k must be float16 like q, got float32; cast q, k and v alike",
    ),
    Bad(
        "v in another dtype than q",
        _attend(v=_zeros(128, 2, 16, dtype=torch.bfloat16)),
        ValueError,
        "v must be float16 like q, got bfloat16; cast q, k and v alike",
    ),
    Bad(
        "v with another head_dim than k",
        _attend(v=_zeros(128, 2, 32)),
        ValueError,
        "v must be [total_k, num_kv_heads, head_dim] = [128, 2, 16] like k, got [128, 2, 32]; give every key a "
        "value of "
        "the same head_dim",
    ),
    Bad(
        "k and v with another head_dim than q",
        _attend(k=_zeros(128, 2, 32), v=_zeros(128, 2, 32)),
        ValueError,
        "k must have the head_dim of q = 16, got 32; pad the smaller with zeros",
    ),
    Bad(
        "head_dim 20",
        _attend(**_qkv(4, 2, 20)),
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got 20; pad q, k and v with zeros and pass softmax_scale "
        "explicitly",
    ),
    Bad(
        "head_dim 264",
        _attend(**_qkv(4, 2, 264)),
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got 264; pad q, k and v with zeros and pass softmax_scale "
        "explicitly",
    ),
    Bad(
        "6 query heads on 4 KV heads",
        _attend(**_qkv(6, 4, 16)),
        ValueError,
        "num_heads must be a positive multiple of num_kv_heads, got 6 query heads and 4 KV heads; group_size = "
        "num_heads / num_kv_heads must be whole",
    ),
    Bad(
        "no KV heads",
        _attend(**_qkv(4, 0, 16)),
        ValueError,
        "num_heads must be a positive multiple of num_kv_heads, got 4 query heads and 0 KV heads; group_size = "
        "num_heads / num_kv_heads must be whole",
    ),
]

SELECTION = [
    Bad(
        "`block_size=48`",
        _attend(block_size=48),
        ValueError,
        "block_size must be one of 32, 64, 128, 256 (keys per selected block), got 48; pass one of them",
    ),
    Bad(
        "`softmax_scale=inf`",
        _attend(softmax_scale=float("inf")),
        ValueError,
        "softmax_scale must be finite and positive, got inf; pass None for head_dim ** -0.5",
    ),
    Bad(
        "`softmax_scale=0.0`",
        _attend(softmax_scale=0.0),
        ValueError,
        "softmax_scale must be finite and positive, got 0.0; pass None for head_dim ** -0.5",
    ),
    Bad(
        "int64 topk_idx (what `torch.topk` returns)",
        _attend(topk_idx=_zeros(2, 128, 4, dtype=torch.int64)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int64 [2, 128, 4]; cast it with "
        ".int()",
    ),
    Bad(
        "a selection per query head",
        _attend(topk_idx=_zeros(4, 128, 4, dtype=torch.int32)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int32 [4, 128, 4]; give every KV "
        "head and query token a row of block ids",
    ),
    Bad(
        "a selection for other tokens",
        _attend(topk_idx=_zeros(2, 100, 4, dtype=torch.int32)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int32 [2, 100, 4]; give every KV "
        "head and query token a row of block ids",
    ),
    Bad(
        "a selection without a head dimension",
        _attend(topk_idx=_zeros(128, 4, dtype=torch.int32)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int32 [128, 4]; give every KV head "
        "and query token a row of block ids",
    ),
    Bad(
        "no slots",
        _attend(topk_idx=_zeros(2, 128, 0, dtype=torch.int32)),
        ValueError,
        "topk must be 1 to 512, got topk_idx [2, 128, 0]; select fewer or larger blocks, or fill one slot with -1",
    ),
    Bad(
        "513 slots",
        _attend(topk_idx=_zeros(2, 128, 513, dtype=torch.int32)),
        ValueError,
        "topk must be 1 to 512, got topk_idx [2, 128, 513]; select fewer or larger blocks, or fill one slot with -1",
    ),
]

SEQUENCES = [
    Bad(
        "int64 cu_seqlens (what `cumsum` returns)",
        _attend(cu_seqlens_q=_ints(0, 128).long()),
        ValueError,
        "cu_seqlens_q must be int32 [batch + 1], got int64 [2]; cast it with .int()",
    ),
    Bad(
        "no sequence",
        _attend(cu_seqlens_q=_ints(0)),
        ValueError,
        "cu_seqlens_q must be int32 [batch + 1] with batch >= 1, got int32 [1]; pass the prefix sums of the sequence "
        "lengths, [0, total] for one sequence",
    ),
    Bad(
        "a matrix of lengths",
        _attend(cu_seqlens_k=_ints(0, 128).reshape(2, 1)),
        ValueError,
        "cu_seqlens_k must be int32 [batch + 1] with batch >= 1, got int32 [2, 1]; pass the prefix sums of the "
        "sequence "
        "lengths, [0, total] for one sequence",
    ),
    Bad(
        "strided cu_seqlens",
        _attend(cu_seqlens_q=_ints(0, 0, 128, 128)[::2]),
        ValueError,
        "cu_seqlens_q must be contiguous, got stride 2; call .contiguous()",
    ),
    Bad(
        "different numbers of sequences",
        _attend(cu_seqlens_k=_ints(0, 64, 128)),
        ValueError,
        "cu_seqlens_k must have the length of cu_seqlens_q = [2], got [3]; describe the same sequences with both",
    ),
    Bad(
        "no cu_seqlens_k though k has other tokens than q",
        _attend(k=_zeros(256, 2, 16), v=_zeros(256, 2, 16)),
        ValueError,
        "cu_seqlens_k must be given when k has another number of tokens than q, got total_q 128 and total_k 256; pass "
        "cu_seqlens_k",
    ),
    Bad(
        "tensors on different devices",
        _attend(k=_zeros(128, 2, 16, device="meta")),
        ValueError,
        "k must be on the device of q = cpu, got meta; move it there",
    ),
]


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
    q = _zeros(128, 4, 16).requires_grad_()
    out = fsa.selected_attention(**(right_arguments() | {"q": q}))
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    dq.sum().backward()


def _backward_operator(**changes: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        a = right_arguments()
        lse = _zeros(4, 128, dtype=torch.float32)
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
        "GPU and "
        "an fsa that was installed where nvcc is found, or backend='auto'",
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
        _on_backend("cuda", "", **_qkv(4, 2, 16, torch.float32)),
        ValueError,
        "q must be float16 or bfloat16 with backend='cuda', got float32; cast q, k and v",
    ),
    Bad(
        "bf16 under Triton's interpreter, which computes it wrong",
        _interpreted(**_qkv(4, 2, 16, torch.bfloat16)),
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
        _backward_operator(dout=_zeros(128, 4, 8)),
        ValueError,
        "dout must be float16 [128, 4, 16] like q, got float16 [128, 4, 8]; pass what the forward returned or its "
        "gradient",
    ),
    Bad(
        "the backward operator with an out of another dtype",
        _backward_operator(out=_zeros(128, 4, 16, dtype=torch.float32)),
        ValueError,
        "out must be float16 [128, 4, 16] like q, got float32 [128, 4, 16]; pass what the forward returned or its "
        "gradient",
    ),
    Bad(
        "the backward operator with a transposed lse",
        _backward_operator(lse=_zeros(128, 4, dtype=torch.float32)),
        ValueError,
        "lse must be float32 [num_heads, total_q] = [4, 128], got float32 [128, 4]; pass what the forward returned or "
        "its gradient",
    ),
    Bad(
        "the backward operator with a dlse in half precision",
        _backward_operator(dlse=_zeros(4, 128, dtype=torch.float16)),
        ValueError,
        "dlse must be float32 [num_heads, total_q] = [4, 128], got float16 [4, 128]; pass what the forward returned or "
        "its gradient",
    ),
]

_SIZES = Sizes(
    total_q=4096,
    total_k=4096,
    num_blocks=65,
    num_kv_heads=2,
    group_size=4,
    head_dim=128,
    topk=16,
    block_size=64,
    dtype=torch.bfloat16,
    num_sms=132,
)


def _limit_in_environment() -> None:
    with mock.patch.dict(os.environ, FSA_WORKSPACE_LIMIT_MIB="1G"):
        workspace._limit_from_environment()


WORKSPACE = [
    Bad(
        "a workspace limit below one query (here 10,000 bytes)",
        lambda: workspace.plan_chunks(_SIZES, "forward", 10_000),
        RuntimeError,
        "workspace limit must hold one query of one KV head, in the forward of this call 18816 bytes, got 10000 bytes; "
        "raise it with fsa.set_workspace_limit(18816) or FSA_WORKSPACE_LIMIT_MIB",
    ),
    Bad(
        "`fsa.set_workspace_limit(1e9)`",
        lambda: fsa.set_workspace_limit(1e9),  # type: ignore[arg-type]
        TypeError,
        "limit must be an int (bytes), got float; pass e.g. 512 * 2**20",
    ),
    Bad(
        "`fsa.set_workspace_limit(0)`",
        lambda: fsa.set_workspace_limit(0),
        ValueError,
        "limit must be positive (bytes), got 0; pass e.g. 512 * 2**20",
    ),
    Bad(
        "`FSA_WORKSPACE_LIMIT_MIB=1G`, when fsa is imported",
        _limit_in_environment,
        ValueError,
        "FSA_WORKSPACE_LIMIT_MIB must be a positive whole number of MiB, got '1G'; unset it or set e.g. 1024",
    ),
]


def _check(topk_idx: Tensor, cu_seqlens_q: Tensor, **options: Any) -> Callable[[], None]:
    return lambda: fsa.check_topk_idx(topk_idx, cu_seqlens_q, **options)


def _selection(*slots: int) -> Tensor:
    """Two KV heads, 128 tokens, all slots unused but those of head 1, token 70."""
    topk_idx = torch.full((2, 128, len(slots)), -1, dtype=torch.int32)
    topk_idx[1, 70] = _ints(*slots)
    return topk_idx


VALIDATION = [
    Bad(
        "int64 topk_idx",
        _check(_selection(0).long(), _ints(0, 128)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk], got int64 [2, 128, 1]; cast it with .int()",
    ),
    Bad(
        "a flat topk_idx",
        _check(_ints(0, 1), _ints(0, 128)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk], got int32 [2]; give every KV head and query token a row "
        "of block ids",
    ),
    Bad(
        "cu_seqlens without the leading 0",
        _check(_selection(0), _ints(100, 128)),
        ValueError,
        "cu_seqlens_q must start with 0, got 100; prepend 0 to the sums of the lengths",
    ),
    Bad(
        "lengths instead of their sums",
        _check(_selection(0), _ints(0, 100, 28)),
        ValueError,
        "cu_seqlens_q must not decrease, got 28 after 100 at index 2; pass the prefix sums of the lengths",
    ),
    Bad(
        "cu_seqlens_q that leaves tokens out",
        _check(_selection(0), _ints(0, 100)),
        ValueError,
        "cu_seqlens_q must end with total_q = 128, got 100; cover every token",
    ),
    Bad(
        "cu_seqlens_k that leaves keys out",
        _check(_selection(0), _ints(0, 128), cu_seqlens_k=_ints(0, 200), total_k=256),
        ValueError,
        "cu_seqlens_k must end with total_k = 256, got 200; cover every token",
    ),
    Bad(
        "a block beyond the sequence",
        _check(_selection(0, 2), _ints(0, 128)),
        ValueError,
        "topk_idx must be -1 or a block of the token's sequence, which has 2 of 64 keys, got 2 at head 1, token 70, "
        "slot 1; count blocks from 0 at the start of the sequence, and fill unused slots with -1",
    ),
    Bad(
        "a negative id other than -1",
        _check(_selection(0, 1, -7), _ints(0, 128)),
        ValueError,
        "topk_idx must be -1 or a block of the token's sequence, which has 2 of 64 keys, got -7 at head 1, token 70, "
        "slot 2; count blocks from 0 at the start of the sequence, and fill unused slots with -1",
    ),
    Bad(
        "a block in the future",
        _check(_selection(3, 0), _ints(0, 128), block_size=32),
        ValueError,
        "topk_idx must select blocks that begin at or before the last key the token sees, key 70 of its sequence, got "
        "3 at head 1, token 70, slot 0, which begins at key 96; mask future blocks with -1 before the top-k",
    ),
    Bad(
        "a block listed twice",
        _check(_selection(1, -1, 0, 1), _ints(0, 128)),
        ValueError,
        "topk_idx must list a block at most once per row, got 1 at head 1, token 70, slot 3 again after slot 0; "
        "replace "
        "the repeat with -1 (the op would count it twice)",
    ),
]
