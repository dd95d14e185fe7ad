"""Every argument error of the package: raised on the host, before any launch, without reading a tensor.

A message says argument, rule, actual value and remedy. What a tensor holds (the values inside cu_seqlens and topk_idx)
cannot be checked without a synchronisation: kernels clamp it and never read out of bounds, and `fsa.check_topk_idx` is
the explicit check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .problem import Arguments

BLOCK_SIZES = (32, 64, 128, 256)
MAX_TOPK = 512
MAX_HEAD_DIM = 256
BACKENDS = ("auto", "cuda", "triton", "reference")


def check_types(arguments: Arguments, backend: str) -> None:
    """Python types, which the operator's schema would reject less clearly, and the name of the backend."""
    for name, tensor in zip(Arguments._fields[:6], arguments[:6], strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type_name(tensor)}; convert it to a tensor")
    _, _, _, _, _, _, block_size, softmax_scale, causal = arguments
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int, got {type_name(block_size)}; pass one of {listed(BLOCK_SIZES)}")
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (float, int, type(None))):
        raise TypeError(
            f"softmax_scale must be a float or None, got {type_name(softmax_scale)}; pass None for head_dim ** -0.5"
        )
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type_name(causal)}; pass True or False")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {listed(BACKENDS)}, got {backend!r}; pass one of them")
    device = arguments.q.device
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"q must be on a CUDA or CPU device, got {device}; move the tensors there")


def check_same_tokens(q: Tensor, k: Tensor) -> None:
    """Without cu_seqlens_k, queries and keys are packed alike."""
    if q.dim() == k.dim() == 3 and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"cu_seqlens_k must be given when k has another number of tokens than q, got total_q {q.shape[0]} and "
            f"total_k {k.shape[0]}; pass cu_seqlens_k"
        )


def check_arguments(arguments: Arguments, dtypes: Sequence[torch.dtype], backend: str) -> None:
    """The contract of the op on shapes, dtypes, devices and scalars; `dtypes` are those that the backend takes."""
    q, k, v, topk_idx, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, _ = arguments
    check_qkv(q, k, v, dtypes, backend)
    check_block_size(block_size)
    check_softmax_scale(softmax_scale)
    check_topk_idx_shape(topk_idx, num_kv_heads=k.shape[1], total_q=q.shape[0])
    check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    check_devices(q, dict(zip(Arguments._fields[1:6], arguments[1:6], strict=True)))


def check_backward_arguments(q: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None) -> None:
    """What the backward operator takes besides the arguments of the forward, which are checked already."""
    lse_shape, lse_dtype = (q.shape[1], q.shape[0]), lse_dtype_of(q)
    for name, tensor in (("out", out), ("dout", dout)):
        if tensor is not None and (tensor.dtype != q.dtype or tensor.shape != q.shape):
            raise ValueError(
                f"{name} must be {described(q)} like q, got {described(tensor)}; "
                f"pass what the forward returned or its gradient"
            )
    for name, tensor in (("lse", lse), ("dlse", dlse)):
        if tensor is not None and (tensor.dtype != lse_dtype or tensor.shape != lse_shape):
            raise ValueError(
                f"{name} must be {dtype_name(lse_dtype)} [num_heads, total_q] = {list(lse_shape)}, "
                f"got {described(tensor)}; pass what the forward returned or its gradient"
            )
    check_devices(q, {"out": out, "lse": lse, "dout": dout, "dlse": dlse})


def lse_dtype_of(q: Tensor) -> torch.dtype:
    """dtype of lse: fp32, and float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_softmax_scale(softmax_scale: float | None) -> None:
    """softmax_scale is None or a number by which scores can be multiplied."""
    if softmax_scale is not None and not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(
            f"softmax_scale must be finite and positive, got {softmax_scale}; pass None for head_dim ** -0.5"
        )


def check_block_size(block_size: int) -> None:
    """block_size is one of the supported ones."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size must be one of {listed(BLOCK_SIZES)} (keys per selected block), got {block_size}; "
            f"pass one of them"
        )


def check_cu_seqlens(first: Tensor, second: Tensor, names: tuple[str, str] = ("cu_seqlens_q", "cu_seqlens_k")) -> None:
    """dtype, shape and layout of both cu_seqlens, and that they describe the same number of sequences."""
    for name, cu_seqlens in zip(names, (first, second), strict=True):
        if cu_seqlens.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [batch + 1], got {described(cu_seqlens)}; cast it with .int()")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"{name} must be int32 [batch + 1] with batch >= 1, got {described(cu_seqlens)}; "
                f"pass the prefix sums of the sequence lengths, [0, total] for one sequence"
            )
        if not cu_seqlens.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {cu_seqlens.stride(0)}; call .contiguous()")
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"{names[1]} must have the length of {names[0]} = [{first.shape[0]}], "
            f"got [{second.shape[0]}]; describe the same sequences with both"
        )


def check_topk_idx_shape(topk_idx: Tensor, num_kv_heads: int | None = None, total_q: int | None = None) -> None:
    """dtype, shape and number of slots; the first two dimensions are compared where they are given."""

    def message(remedy: str) -> str:
        shape = f" = [{num_kv_heads}, {total_q}, topk]" if num_kv_heads is not None else ""
        return f"topk_idx must be int32 [num_kv_heads, total_q, topk]{shape}, got {described(topk_idx)}; {remedy}"

    if topk_idx.dtype != torch.int32:
        raise ValueError(message("cast it with .int()"))
    wrong_rows = num_kv_heads is not None and topk_idx.shape[:2] != (num_kv_heads, total_q)
    if topk_idx.dim() != 3 or wrong_rows:
        raise ValueError(message("give every KV head and query token a row of block ids"))
    if topk_idx.shape[2] < 1 or topk_idx.shape[2] > MAX_TOPK:
        raise ValueError(
            f"topk must be 1 to {MAX_TOPK}, got topk_idx {list(topk_idx.shape)}; select fewer or larger blocks, "
            f"or fill one slot with -1"
        )


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtypes: Sequence[torch.dtype],
    backend: str,
    names: tuple[str, str] = ("k", "v"),
    rows: tuple[str, str] = ("total_q", "total_k"),
) -> None:
    """Shapes and dtypes of q, k and v; `names` is what k and v are called, `rows` the rows of q and k."""
    k_name, v_name = names
    k_shape = f"{rows[1]}, num_kv_heads"
    for name, tensor, heads in (("q", q, f"{rows[0]}, num_heads"), (k_name, k, k_shape)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must be [{heads}, head_dim], got {list(tensor.shape)}; "
                f"pack all sequences along dimension 0, without a batch dimension"
            )
    if q.dtype not in dtypes:
        *some, last = (dtype_name(dtype) for dtype in dtypes)
        allowed = f"{', '.join(some)} or {last}"
        raise ValueError(
            f"q must be {allowed} with {backend}, got {dtype_name(q.dtype)}; cast q, {k_name} and {v_name}"
        )
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.dtype != q.dtype:
            raise ValueError(
                f"{name} must be {dtype_name(q.dtype)} like q, got {dtype_name(tensor.dtype)}; "
                f"cast q, {k_name} and {v_name} alike"
            )
    if v.shape != k.shape:
        raise ValueError(
            f"{v_name} must be [{k_shape}, head_dim] = {list(k.shape)} like {k_name}, got {list(v.shape)}; "
            f"give every key a value of the same head_dim"
        )
    head_dim, num_heads, num_kv_heads = q.shape[2], q.shape[1], k.shape[1]
    if k.shape[2] != head_dim:
        raise ValueError(
            f"{k_name} must have the head_dim of q = {head_dim}, got {k.shape[2]}; pad the smaller with zeros"
        )
    if head_dim < 8 or head_dim > MAX_HEAD_DIM or head_dim % 8 != 0:
        raise ValueError(
            f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}; pad q, k and v with zeros and "
            f"pass softmax_scale explicitly"
        )
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"num_heads must be a positive multiple of num_kv_heads, got {num_heads} query heads and {num_kv_heads} "
            f"KV heads; group_size = num_heads / num_kv_heads must be whole"
        )


def check_devices(q: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """All tensors are on the device of q; None stands for one that is not given."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q = {q.device}, got {tensor.device}; move it there")


def listed(values: Sequence[object]) -> str:
    """As messages list them: 32, 64."""
    return ", ".join(repr(value) for value in values)


def type_name(value: object) -> str:
    """The name of its type: float."""
    return type(value).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch.": float32."""
    return str(dtype).removeprefix("torch.")


def described(tensor: Tensor) -> str:
    """dtype and shape: float32 [4, 16]."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
