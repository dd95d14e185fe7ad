"""Errors of the arguments of `selected_attention`; test_errors.py runs them and writes docs/errors.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from errors import Bad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fsa


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def right_arguments() -> dict[str, Any]:
    """A call that is right: 128 tokens, 4 query heads on 2 KV heads, head_dim 16, 4 slots."""
    return {
        "q": zeros(128, 4, 16),
        "k": zeros(128, 2, 16),
        "v": zeros(128, 2, 16),
        "topk_idx": zeros(2, 128, 4, dtype=torch.int32),
        "cu_seqlens_q": ints(0, 128),
    }


@dataclass(frozen=True)
class _Attend:
    """A call of the op with some arguments changed."""

    changes: dict[str, Any]

    def __call__(self) -> Any:
        return fsa.selected_attention(**(right_arguments() | self.changes))


def _attend(**changes: Any) -> _Attend:
    return _Attend(changes)


def zeros(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _fake(device: str) -> Tensor:
    with FakeTensorMode():
        return torch.empty(128, 4, 16, device=device)


def qkv(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    key = zeros(128, kv_heads, head_dim, dtype=dtype)
    return {"q": zeros(128, heads, head_dim, dtype=dtype), "k": key, "v": key}


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
        _attend(q=zeros(1, 128, 4, 16)),
        ValueError,
        "q must be [total_q, num_heads, head_dim], got [1, 128, 4, 16]; pack all sequences along dimension 0, "
        "without a batch dimension",
    ),
    Bad(
        "a batch dimension in k",
        _attend(k=zeros(1, 128, 2, 16)),
        ValueError,
        "k must be [total_k, num_kv_heads, head_dim], got [1, 128, 2, 16]; pack all sequences along dimension 0, "
        "without a batch dimension",
    ),
    Bad(
        "integer q",
        _attend(**qkv(4, 2, 16, torch.int32)),
        ValueError,
        "q must be float16, bfloat16, float32 or float64 with backend='auto', got int32; cast q, k and v",
    ),
    Bad(
        "k in another dtype than q",
        _attend(k=zeros(128, 2, 16, dtype=torch.float32)),
        ValueError,
        "k must be float16 like q, got float32; cast q, k and v alike",
    ),
    Bad(
        "v in another dtype than q",
        _attend(v=zeros(128, 2, 16, dtype=torch.bfloat16)),
        ValueError,
        "v must be float16 like q, got bfloat16; cast q, k and v alike",
    ),
    Bad(
        "v with another head_dim than k",
        _attend(v=zeros(128, 2, 32)),
        ValueError,
        "v must be [total_k, num_kv_heads, head_dim] = [128, 2, 16] like k, got [128, 2, 32]; give every key a "
        "value of the same head_dim",
    ),
    Bad(
        "k and v with another head_dim than q",
        _attend(k=zeros(128, 2, 32), v=zeros(128, 2, 32)),
        ValueError,
        "k must have the head_dim of q = 16, got 32; pad the smaller with zeros",
    ),
    Bad(
        "head_dim 20",
        _attend(**qkv(4, 2, 20)),
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got 20; pad q, k and v with zeros and pass softmax_scale "
        "explicitly",
    ),
    Bad(
        "head_dim 264",
        _attend(**qkv(4, 2, 264)),
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got 264; pad q, k and v with zeros and pass softmax_scale "
        "explicitly",
    ),
    Bad(
        "6 query heads on 4 KV heads",
        _attend(**qkv(6, 4, 16)),
        ValueError,
        "num_heads must be a positive multiple of num_kv_heads, got 6 query heads and 4 KV heads; group_size = "
        "num_heads / num_kv_heads must be whole",
    ),
    Bad(
        "no KV heads",
        _attend(**qkv(4, 0, 16)),
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
        _attend(topk_idx=zeros(2, 128, 4, dtype=torch.int64)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int64 [2, 128, 4]; cast it with "
        ".int()",
    ),
    Bad(
        "a selection per query head",
        _attend(topk_idx=zeros(4, 128, 4, dtype=torch.int32)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int32 [4, 128, 4]; give every KV "
        "head and query token a row of block ids",
    ),
    Bad(
        "a selection for other tokens",
        _attend(topk_idx=zeros(2, 100, 4, dtype=torch.int32)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int32 [2, 100, 4]; give every KV "
        "head and query token a row of block ids",
    ),
    Bad(
        "a selection without a head dimension",
        _attend(topk_idx=zeros(128, 4, dtype=torch.int32)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk] = [2, 128, topk], got int32 [128, 4]; give every KV head "
        "and query token a row of block ids",
    ),
    Bad(
        "no slots",
        _attend(topk_idx=zeros(2, 128, 0, dtype=torch.int32)),
        ValueError,
        "topk must be 1 to 512, got topk_idx [2, 128, 0]; select fewer or larger blocks, or fill one slot with -1",
    ),
    Bad(
        "513 slots",
        _attend(topk_idx=zeros(2, 128, 513, dtype=torch.int32)),
        ValueError,
        "topk must be 1 to 512, got topk_idx [2, 128, 513]; select fewer or larger blocks, or fill one slot with -1",
    ),
]

SEQUENCES = [
    Bad(
        "int64 cu_seqlens (what `cumsum` returns)",
        _attend(cu_seqlens_q=ints(0, 128).long()),
        ValueError,
        "cu_seqlens_q must be int32 [batch + 1], got int64 [2]; cast it with .int()",
    ),
    Bad(
        "no sequence",
        _attend(cu_seqlens_q=ints(0)),
        ValueError,
        "cu_seqlens_q must be int32 [batch + 1] with batch >= 1, got int32 [1]; pass the prefix sums of the sequence "
        "lengths, [0, total] for one sequence",
    ),
    Bad(
        "a matrix of lengths",
        _attend(cu_seqlens_k=ints(0, 128).reshape(2, 1)),
        ValueError,
        "cu_seqlens_k must be int32 [batch + 1] with batch >= 1, got int32 [2, 1]; pass the prefix sums of the "
        "sequence lengths, [0, total] for one sequence",
    ),
    Bad(
        "strided cu_seqlens",
        _attend(cu_seqlens_q=ints(0, 0, 128, 128)[::2]),
        ValueError,
        "cu_seqlens_q must be contiguous, got stride 2; call .contiguous()",
    ),
    Bad(
        "different numbers of sequences",
        _attend(cu_seqlens_k=ints(0, 64, 128)),
        ValueError,
        "cu_seqlens_k must have the length of cu_seqlens_q = [2], got [3]; describe the same sequences with both",
    ),
    Bad(
        "no cu_seqlens_k though k has other tokens than q",
        _attend(k=zeros(256, 2, 16), v=zeros(256, 2, 16)),
        ValueError,
        "cu_seqlens_k must be given when k has another number of tokens than q, got total_q 128 and total_k 256; pass "
        "cu_seqlens_k",
    ),
    Bad(
        "tensors on different devices",
        _attend(k=zeros(128, 2, 16, device="meta")),
        ValueError,
        "k must be on the device of q = cpu, got meta; move it there",
    ),
]
