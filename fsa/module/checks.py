"""Errors of the module's arguments: raised on the host, before any launch, without reading a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends
from ..checks import (
    MAX_HEAD_DIM,
    MAX_TOPK,
    check_block_size,
    check_cu_seqlens,
    check_devices,
    check_qkv,
    check_softmax_scale,
    described,
    dtype_name,
    listed,
    lse_dtype_of,
    type_name,
)

if TYPE_CHECKING:
    from .rope import RopeConfig

BACKENDS = ("auto", "triton", "reference")
# Of the module, and of the parts that have CUDA kernels of their own.
CUDA_BACKENDS = ("auto", "cuda", "triton", "reference")
COMPRESSIONS = ("linear", "mean")
GATES = ("token", "head")
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
CU_SEQLENS = ("cu_seqlens", "compressed_cu_seqlens")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """An argument is one of a few names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {listed(choices)}, got {value!r}; pass one of them")


def choose_backend(family: str, x: Tensor, what: str, kernels: tuple[str, ...] = ("triton",)) -> str:
    """The backend that runs an op of the module, of `kernels` or "reference"; raises if the one asked for cannot."""
    if family == "auto":
        return backends.choose(x.device, x.dtype, kernels, what)
    backends.require(family, x.device)
    return family


def check_tensors(**tensors: object) -> None:
    """Arguments that must be tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type_name(tensor)}; convert it to a tensor")


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """An argument is a whole number, not too small."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type_name(value)}; pass a whole number")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}; pass a larger number")


def check_windows(kernel_size: int, kernel_stride: int) -> None:
    """Windows are made of whole strides."""
    check_count("kernel_stride", kernel_stride)
    check_count("kernel_size", kernel_size)
    if kernel_size % kernel_stride:
        raise ValueError(
            f"kernel_size must be a multiple of kernel_stride = {kernel_stride}, got {kernel_size}; "
            f"choose windows of whole strides"
        )


def check_selection(
    kernel_size: int, kernel_stride: int, block_size: int, topk: int, init_blocks: int, local_blocks: int
) -> None:
    """What selects blocks: blocks of whole strides that are no smaller than a window, slots for all forced blocks."""
    check_count("block_size", block_size)
    check_block_size(block_size)
    if block_size % kernel_stride or block_size < kernel_size:
        raise ValueError(
            f"block_size must be a multiple of kernel_stride = {kernel_stride} and at least "
            f"kernel_size = {kernel_size}, got {block_size}; choose larger blocks or smaller windows"
        )
    check_count("topk", topk)
    check_count("init_blocks", init_blocks, minimum=0)
    check_count("local_blocks", local_blocks, minimum=0)
    if not init_blocks + local_blocks <= topk <= MAX_TOPK:
        raise ValueError(
            f"topk must be at least init_blocks + local_blocks = {init_blocks + local_blocks} and at most {MAX_TOPK}, "
            f"got {topk}; select more blocks or force fewer"
        )


def check_compressed(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    compressed_cu_seqlens: Tensor,
    softmax_scale: float | None,
    family: str,
) -> None:
    """Queries and compressed keys; a call without values passes compressed_k twice."""
    dtypes, backend = backends.contract(family)
    names, rows = ("compressed_k", "compressed_v"), ("total", "max_windows")
    check_qkv(q, compressed_k, compressed_v, dtypes, backend, names, rows)
    check_softmax_scale(softmax_scale)
    check_cu_seqlens(cu_seqlens, compressed_cu_seqlens, CU_SEQLENS)
    check_devices(
        q,
        {
            "compressed_k": compressed_k,
            "compressed_v": compressed_v,
            "cu_seqlens": cu_seqlens,
            "compressed_cu_seqlens": compressed_cu_seqlens,
        },
    )


def check_same_tokens(q: Tensor, k: Tensor) -> None:
    """The module attends to the tokens that ask."""
    if k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k must have as many tokens as q = {q.shape[0]}, got {k.shape[0]}; pass the keys and values of the same "
            f"tokens"
        )


def check_lse(q: Tensor, lse: Tensor) -> None:
    """lse is what compressed_attention returned for q."""
    shape, dtype = (q.shape[1], q.shape[0]), lse_dtype_of(q)
    if lse.shape != shape or lse.dtype != dtype:
        raise ValueError(
            f"lse must be {dtype_name(dtype)} [num_heads, total] = {list(shape)}, got {described(lse)}; "
            f"pass the lse of compressed_attention of the same q"
        )
    check_devices(q, {"lse": lse})


def _check_dtype(name: str, tensor: Tensor, family: str) -> None:
    dtypes, backend = backends.contract(family)
    if tensor.dtype not in dtypes:
        *some, last = map(dtype_name, dtypes)
        raise ValueError(
            f"{name} must be {', '.join(some)} or {last} with {backend}, got {dtype_name(tensor.dtype)}; cast it"
        )


def check_rotation(x: Tensor, cosine: Tensor, sine: Tensor, family: str) -> None:
    """Heads of whole pairs, and an angle for every pair of every token."""
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(
            f"x must be [total, heads, head_dim] with an even head_dim, got {list(x.shape)}; pack all sequences along "
            f"dimension 0"
        )
    _check_dtype("x", x, family)
    shape, dtype = (x.shape[0], 1, x.shape[2] // 2), lse_dtype_of(x)
    for name, table in (("cosine", cosine), ("sine", sine)):
        if table.shape != shape or table.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype_name(dtype)} [total, 1, head_dim / 2] = {list(shape)}, got {described(table)}; "
                f"pass what RotaryEmbedding returns for the positions of x and its dtype"
            )
        if table.device != x.device:
            raise ValueError(f"{name} must be on the device of x = {x.device}, got {table.device}; move it there")


def check_gated_sum(gates: Tensor, branches: Sequence[Tensor], family: str) -> None:
    """Three branches alike, and three gates a token or a head."""
    compressed, selected, sliding = branches
    if compressed.dim() != 3:
        raise ValueError(
            f"compressed must be [total, num_heads, head_dim], got {list(compressed.shape)}; pack all sequences along "
            f"dimension 0"
        )
    _check_dtype("compressed", compressed, family)
    for name, branch in (("selected", selected), ("sliding", sliding)):
        if branch.shape != compressed.shape or branch.dtype != compressed.dtype:
            raise ValueError(
                f"{name} must be {described(compressed)} like compressed, got {described(branch)}; pass what the "
                f"branches make of the same queries"
            )
    total, num_heads, _ = compressed.shape
    _check_dtype("gates", gates, family)
    if gates.dim() != 2 or gates.shape[0] != total or gates.shape[1] not in (3, 3 * num_heads):
        raise ValueError(
            f"gates must be [total, 3] or [total, 3 * num_heads] = [{total}, {3 * num_heads}], got "
            f"{list(gates.shape)}; pass a gate a branch, for every token or for every head of it"
        )
    for name, tensor in (("gates", gates), ("selected", selected), ("sliding", sliding)):
        if tensor.device != compressed.device:
            raise ValueError(
                f"{name} must be on the device of compressed = {compressed.device}, got {tensor.device}; move it there"
            )


def check_dout(dout: Tensor, out: Tensor) -> None:
    """The gradient of a result."""
    if dout.shape != out.shape or dout.dtype != out.dtype or dout.device != out.device:
        raise ValueError(
            f"dout must be {described(out)} on {out.device}, got {described(dout)} on {dout.device}; pass the gradient "
            f"of what the forward returned"
        )


def check_module(
    hidden_size: int, num_q_heads: int, num_kv_heads: int, head_dim: int, window_size: int, rope_config: RopeConfig
) -> None:
    """The sizes of the module that no part of it checks."""
    sizes = {"hidden_size": hidden_size, "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
    for name, value in (sizes | {"head_dim": head_dim, "window_size": window_size}).items():
        check_count(name, value)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_q_heads}; "
            f"group_size = num_q_heads / num_kv_heads must be whole"
        )
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}; choose one")
    if rope_config.head_dim != head_dim:
        raise ValueError(
            f"rope_config must have the head_dim of the module = {head_dim}, got {rope_config.head_dim}; "
            f"pass RopeConfig(head_dim={head_dim}, ...)"
        )


def check_sequences(cu_seqlens: Tensor) -> None:
    """cu_seqlens of any integer dtype: the module casts them."""
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype not in INTEGERS:
        raise ValueError(f"cu_seqlens must be integers, got {described(cu_seqlens)}; cast it with .int()")


def check_input(x: Tensor, hidden_size: int, weight: Tensor) -> None:
    """What the module is called with, but for cu_seqlens."""
    check_tensors(x=x)
    if x.dim() != 2 or x.shape[1] != hidden_size:
        raise ValueError(
            f"x must be [total, hidden_size] = [total, {hidden_size}], got {list(x.shape)}; "
            f"pack all sequences along dimension 0, without a batch dimension"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"x must be {dtype_name(weight.dtype)} like the module's parameters, got {dtype_name(x.dtype)}; "
            f"cast one of them or use torch.autocast"
        )
