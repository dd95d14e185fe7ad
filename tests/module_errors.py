"""Errors of `FlashSparseAttention` and of its parts; test_errors.py runs them and writes docs/errors.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from errors import Bad
from torch import Tensor

from fsa import FlashSparseAttention, RopeConfig, backends
from fsa.module import cuda_selection
from fsa.module.compressed_attention import compressed_attention
from fsa.module.gated_sum import gated_sum
from fsa.module.rope import rotate
from fsa.module.selection import select_blocks
from fsa.module.sliding_window import sliding_window_attention

_SIZES = {
    "hidden_size": 32,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "kernel_size": 32,
    "kernel_stride": 16,
    "block_size": 64,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 2,
    "window_size": 64,
}


def _make(**changes: Any) -> Callable[[], Any]:
    return lambda: FlashSparseAttention(**({**_SIZES, "rope_config": RopeConfig(head_dim=16)} | changes))


def _scaled(**scaling: Any) -> Callable[[], Any]:
    return _make(rope_config=RopeConfig(head_dim=16, rope_scaling=scaling))


def _run(x: Any, dtype: torch.dtype = torch.int32) -> Callable[[], Any]:
    return lambda: _make()()(x, torch.tensor([0, 100], dtype=dtype))


MODULE = [
    Bad(
        "`num_q_heads=5` with 2 KV heads",
        _make(num_q_heads=5),
        ValueError,
        "num_q_heads must be a multiple of num_kv_heads = 2, got 5; group_size = num_q_heads / num_kv_heads must be "
        "whole",
    ),
    Bad(
        "`head_dim=20`",
        _make(head_dim=20),
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got 20; choose one",
    ),
    Bad(
        "`window_size=0`",
        _make(window_size=0),
        ValueError,
        "window_size must be at least 1, got 0; pass a larger number",
    ),
    Bad("`topk=16.0`", _make(topk=16.0), TypeError, "topk must be an int, got float; pass a whole number"),
    Bad(
        "`kernel_size=24` with stride 16",
        _make(kernel_size=24),
        ValueError,
        "kernel_size must be a multiple of kernel_stride = 16, got 24; choose windows of whole strides",
    ),
    Bad(
        "`block_size=48`",
        _make(block_size=48),
        ValueError,
        "block_size must be one of 32, 64, 128, 256 (keys per selected block), got 48; pass one of them",
    ),
    Bad(
        "windows larger than blocks",
        _make(kernel_size=128),
        ValueError,
        "block_size must be a multiple of kernel_stride = 16 and at least kernel_size = 128, got 64; choose larger "
        "blocks or smaller windows",
    ),
    Bad(
        "more forced blocks than slots",
        _make(topk=2),
        ValueError,
        "topk must be at least init_blocks + local_blocks = 3 and at most 512, got 2; select more blocks or force "
        "fewer",
    ),
    Bad(
        "a RopeConfig for another head_dim",
        _make(rope_config=RopeConfig()),
        ValueError,
        "rope_config must have the head_dim of the module = 16, got 128; pass RopeConfig(head_dim=16, ...)",
    ),
    Bad(
        "`rope_type='yarn'`",
        _scaled(rope_type="yarn", factor=4.0),
        ValueError,
        "rope_type must be one of 'default', 'llama3', got 'yarn'; choose one in rope_scaling",
    ),
    Bad(
        "Llama 3's scaling without its numbers",
        _scaled(rope_type="llama3", factor=8.0, low_freq_factor=1.0),
        ValueError,
        "rope_scaling of rope_type 'llama3' must have factor, high_freq_factor, low_freq_factor and "
        "original_max_position_embeddings, got none of high_freq_factor, original_max_position_embeddings; add them",
    ),
    Bad(
        "`compression='conv'`",
        _make(compression="conv"),
        ValueError,
        "compression must be one of 'linear', 'mean', got 'conv'; pass one of them",
    ),
    Bad(
        "`gate='branch'`",
        _make(gate="branch"),
        ValueError,
        "gate must be one of 'token', 'head', got 'branch'; pass one of them",
    ),
    Bad(
        "a batch dimension in x",
        _run(torch.zeros(1, 100, 32)),
        ValueError,
        "x must be [total, hidden_size] = [total, 32], got [1, 100, 32]; pack all sequences along dimension 0, without "
        "a batch dimension",
    ),
    Bad(
        "x in another dtype than the parameters",
        _run(torch.zeros(100, 32, dtype=torch.float16)),
        ValueError,
        "x must be float32 like the module's parameters, got float16; cast one of them or use torch.autocast",
    ),
    Bad(
        "`module(None, cu_seqlens)`",
        _run(None),
        TypeError,
        "x must be a torch.Tensor, got NoneType; convert it to a tensor",
    ),
    Bad(
        "floating-point cu_seqlens in the module",
        _run(torch.zeros(100, 32), torch.float32),
        ValueError,
        "cu_seqlens must be integers, got float32 [2]; cast it with .int()",
    ),
    Bad(
        "the same in `attend`",
        lambda: _make()().attend(*[_zeros(100, heads, 16) for heads in (4, 2, 2)], _zeros(100, 3), _zeros(2)),
        ValueError,
        "cu_seqlens must be integers, got float32 [2]; cast it with .int()",
    ),
]


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _arguments() -> dict[str, Any]:
    """100 tokens, 5 windows."""
    return {
        "q": _zeros(100, 4, 16),
        "compressed_k": _zeros(6, 2, 16),
        "cu_seqlens": torch.tensor([0, 100], dtype=torch.int32),
        "compressed_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "kernel_size": 32,
        "kernel_stride": 16,
    }


def _compressed(**changes: Any) -> Callable[[], Any]:
    return lambda: compressed_attention(**(_arguments() | {"compressed_v": _zeros(6, 2, 16)} | changes))


def _select(**changes: Any) -> Callable[[], Any]:
    sizes = {"block_size": 64, "topk": 4, "init_blocks": 1, "local_blocks": 2}
    return lambda: select_blocks(**(_arguments() | {"lse": _zeros(4, 100)} | sizes | changes))


def _select_with_cuda(**changes: Any) -> Callable[[], Any]:
    """On a machine with a Hopper GPU."""

    def call() -> Any:
        usable = mock.patch.object(backends, "status", return_value=backends.BackendStatus("cuda", True))
        with usable, mock.patch.object(cuda_selection, "kernel_arch", return_value=90):
            return _select(**changes, backend="cuda")()

    return call


def _slide(**changes: Any) -> Callable[[], Any]:
    cu_seqlens = torch.tensor([0, 100], dtype=torch.int32)
    arguments = {"q": _zeros(100, 4, 16), "k": _zeros(100, 2, 16), "v": _zeros(100, 2, 16), "cu_seqlens": cu_seqlens}
    return lambda: sliding_window_attention(**(arguments | {"window_size": 64} | changes))


def _rotate(**changes: Any) -> Callable[[], Any]:
    table = _zeros(100, 1, 8)
    return lambda: rotate(**({"x": _zeros(100, 4, 16), "cosine": table, "sine": table} | changes))


def _add_up(**changes: Any) -> Callable[[], Any]:
    names = "compressed", "selected", "sliding"
    arguments = {"gates": _zeros(100, 3)} | {name: _zeros(100, 4, 16) for name in names}
    return lambda: gated_sum(**(arguments | changes))


MODULE_PARTS = [
    Bad(
        "compressed attention on `backend='cuda'`",
        _compressed(backend="cuda"),
        ValueError,
        "backend must be one of 'auto', 'triton', 'reference', got 'cuda'; pass one of them",
    ),
    Bad(
        "compressed values of another shape than keys",
        _compressed(compressed_v=_zeros(5, 2, 16)),
        ValueError,
        "compressed_v must be [max_windows, num_kv_heads, head_dim] = [6, 2, 16] like compressed_k, got [5, 2, 16]; "
        "give every key a value of the same head_dim",
    ),
    Bad(
        "compressed keys in another dtype",
        _compressed(compressed_k=_zeros(6, 2, 16, dtype=torch.float16)),
        ValueError,
        "compressed_k must be float32 like q, got float16; cast q, compressed_k and compressed_v alike",
    ),
    Bad(
        "cu_seqlens of other sequences",
        _compressed(compressed_cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32)),
        ValueError,
        "compressed_cu_seqlens must have the length of cu_seqlens = [2], got [3]; describe the same sequences with "
        "both",
    ),
    Bad(
        "`select_blocks` on `backend='cuda'` with blocks of two strides",
        _select_with_cuda(block_size=32),
        RuntimeError,
        "backend must have kernels for the selection, got backend='cuda': block scores have CUDA kernels for blocks of "
        "4, 8 or 16 strides; use 'auto'",
    ),
    Bad(
        "lse of other queries",
        _select(lse=_zeros(4, 99)),
        ValueError,
        "lse must be float32 [num_heads, total] = [4, 100], got float32 [4, 99]; pass the lse of compressed_attention "
        "of the same q",
    ),
    Bad(
        "`init_blocks=-1`",
        _select(init_blocks=-1),
        ValueError,
        "init_blocks must be at least 0, got -1; pass a larger number",
    ),
    Bad(
        "fewer keys than queries in the sliding window",
        _slide(k=_zeros(99, 2, 16), v=_zeros(99, 2, 16)),
        ValueError,
        "k must have as many tokens as q = 100, got 99; pass the keys and values of the same tokens",
    ),
    Bad(
        "RoPE of an odd head_dim",
        _rotate(x=_zeros(100, 4, 15)),
        ValueError,
        "x must be [total, heads, head_dim] with an even head_dim, got [100, 4, 15]; pack all sequences along "
        "dimension 0",
    ),
    Bad(
        "RoPE of integers",
        _rotate(x=_zeros(100, 4, 16, dtype=torch.int32)),
        ValueError,
        "x must be float16, bfloat16, float32 or float64 with backend='auto', got int32; cast it",
    ),
    Bad(
        "sines of other tokens",
        _rotate(sine=_zeros(99, 1, 8)),
        ValueError,
        "sine must be float32 [total, 1, head_dim / 2] = [100, 1, 8], got float32 [99, 1, 8]; pass what "
        "RotaryEmbedding returns for the positions of x and its dtype",
    ),
    Bad(
        "sines on another device",
        _rotate(sine=torch.zeros(100, 1, 8, device="meta")),
        ValueError,
        "sine must be on the device of x = cpu, got meta; move it there",
    ),
    Bad(
        "branches without a head dimension",
        _add_up(compressed=_zeros(100, 64)),
        ValueError,
        "compressed must be [total, num_heads, head_dim], got [100, 64]; pack all sequences along dimension 0",
    ),
    Bad(
        "branches of other queries",
        _add_up(sliding=_zeros(99, 4, 16)),
        ValueError,
        "sliding must be float32 [100, 4, 16] like compressed, got float32 [99, 4, 16]; pass what the branches make of "
        "the same queries",
    ),
    Bad(
        "two gates a token",
        _add_up(gates=_zeros(100, 2)),
        ValueError,
        "gates must be [total, 3] or [total, 3 * num_heads] = [100, 12], got [100, 2]; pass a gate a branch, for every "
        "token or for every head of it",
    ),
    Bad(
        "gates on another device",
        _add_up(gates=torch.zeros(100, 3, device="meta")),
        ValueError,
        "gates must be on the device of compressed = cpu, got meta; move it there",
    ),
    Bad(
        "a gradient of another dtype",
        lambda: torch.ops.fsa.gated_sum_backward.default(
            _zeros(100, 4, 16, dtype=torch.float16), _zeros(100, 3), *[_zeros(100, 4, 16)] * 3
        ),
        ValueError,
        "dout must be float32 [100, 4, 16] on cpu, got float16 [100, 4, 16] on cpu; pass the gradient of what the "
        "forward returned",
    ),
]
