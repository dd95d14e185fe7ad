"""The public function and the operators behind it: schema, implementations, fake, autograd and autocast, side by side.

`torch.ops.fsa.selected_attention` picks the backend by device. The same four registrations make one private family per
explicit backend (`torch.ops.fsa._selected_attention_cuda`, `..._triton`, `..._reference`). Every family has a backward
operator of its own, `<name>_backward`.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import backends, checks, pipeline, reference
from .problem import Arguments, Problem
from .registration import Definition, register_with_backward

_FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "int block_size, float? softmax_scale, bool causal) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor topk_idx, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, float? softmax_scale, bool causal) "
    "-> (Tensor, Tensor, Tensor)"
)
_OP_NAMES = {
    "auto": "selected_attention",
    "cuda": "_selected_attention_cuda",
    "triton": "_selected_attention_triton",
    "reference": "_selected_attention_reference",
}


@overload
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    softmax_scale: float | None = None,
    causal: bool = True,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    softmax_scale: float | None = None,
    causal: bool = True,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    softmax_scale: float | None = None,
    causal: bool = True,
    return_lse: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    softmax_scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selected attention, the sparse branch of Native Sparse Attention: each query attends to the KV blocks it lists.

    Query token t of KV head h attends, with all `num_heads / num_kv_heads` query heads of its group, to the keys of the
    blocks `topk_idx[h, t]` of its own sequence that the causal mask lets it see. Source: Native Sparse Attention
    (arXiv 2502.11089); the order of the loops, KV blocks outside and queries inside, is Flash Sparse Attention's
    (arXiv 2508.18224).

    Args:
        q: [total_q, num_heads, head_dim], queries of all sequences one after the other.
        k, v: [total_k, num_kv_heads, head_dim], dtype of q; `num_heads` is a multiple of `num_kv_heads`.
        topk_idx: [num_kv_heads, total_q, topk], int32. Block i of a sequence is its keys [i * block_size, (i + 1) *
            block_size). -1 marks an unused slot; slots come in any order. A block listed twice counts twice. Ids beyond
            the sequence, and other negative ones, count as unused; `check_topk_idx` finds them.
        cu_seqlens_q, cu_seqlens_k: [batch + 1], int32, where sequences begin, and the total. None: k is packed like q.
        block_size: keys per block: 32, 64, 128 or 256.
        softmax_scale: positive factor of the scores. None: head_dim ** -0.5.
        causal: query i of a sequence sees its keys up to i + len_k - len_q (the last query sees every key).
        return_lse: also return lse.
        backend: "auto" (CUDA tensors: the first usable of cuda, triton and reference that takes the dtype; CPU tensors:
            reference), "cuda" (fp16, bf16), "triton" (also fp32), or "reference" (also float64). See `python -m fsa`.

    head_dim is a multiple of 8 up to 256, topk 1 to 512. No argument is read on the host, so nothing waits for the GPU
    (the reference neither). Values inside `topk_idx` and `cu_seqlens` are clamped where they are used, never followed
    out of bounds. q, k and v take gradients, through out and through lse; there is no second derivative. Under autocast
    they are cast to its dtype.

    Returns:
        out: [total_q, num_heads, head_dim], dtype of q. A query that attends to no key gets 0 and gives no gradient.
        lse: [num_heads, total_q], fp32 (float64 for float64 inputs): natural log of the sum of exp(softmax_scale * q·k)
            over the attended keys; -inf for a query that attends to no key. Only with `return_lse`.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value against the contract; docs/errors.md lists the messages.
        RuntimeError: the chosen backend is not usable, or the workspace limit is too small for one query.

    Example:
        Two sequences of 100 and 28 tokens, 4 query heads on 2 KV heads; each token selects the first block and its own.

        >>> import torch, fsa
        >>> q, k, v = torch.randn(128, 4, 64), torch.randn(128, 2, 64), torch.randn(128, 2, 64)
        >>> cu_seqlens = torch.tensor([0, 100, 128], dtype=torch.int32)
        >>> position = torch.cat([torch.arange(100), torch.arange(28)])
        >>> own = torch.where(position < 32, -1, position // 32)  # the first block is listed already
        >>> topk_idx = torch.stack([torch.zeros_like(own), own], dim=-1).int().expand(2, -1, -1)
        >>> fsa.selected_attention(q, k, v, topk_idx, cu_seqlens, block_size=32).shape
        torch.Size([128, 4, 64])
    """
    keys_like_queries = cu_seqlens_k is None
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    arguments = Arguments(q, k, v, topk_idx, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, causal)
    checks.check_types(arguments, backend)
    if keys_like_queries:
        checks.check_same_tokens(q, k)
    out, lse = getattr(torch.ops.fsa, _OP_NAMES[backend]).default(*arguments)
    return (out, lse) if return_lse else out


def FSA_topk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
) -> Tensor:
    """`selected_attention`, causal, under the name and with the arguments of the published FSA package; returns out."""
    return selected_attention(q, k, v, topk_idx, cu_seqlens, block_size=block_size, softmax_scale=softmax_scale)


# ---------------------------------------------------------------------------------------------------------------------
# Implementations
# ---------------------------------------------------------------------------------------------------------------------
def _check(family: str, arguments: Arguments) -> None:
    dtypes, name = backends.contract(family)
    checks.check_arguments(arguments, dtypes, name)


def _checked_backend(family: str, arguments: Arguments) -> str:
    """Checks everything that can be wrong; returns the backend that runs."""
    if family != "auto":
        backends.require(family, arguments.q.device)
    _check(family, arguments)
    return backends.choose(arguments.q.device, arguments.q.dtype) if family == "auto" else family


def _make_problem(backend: str, arguments: Arguments) -> Problem:
    q, k, v, topk_idx, cu_seqlens_q, cu_seqlens_k, block_size, softmax_scale, causal = arguments
    if backend != "reference":
        q, k, v = (pipeline.as_kernel_input(tensor) for tensor in (q, k, v))
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return Problem(q, k, v, topk_idx.contiguous(), cu_seqlens_q, cu_seqlens_k, block_size, scale, causal)


def _forward(family: str, *values: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*values)
    backend = _checked_backend(family, arguments)
    problem = _make_problem(backend, arguments)
    if backend == "reference":
        return reference.forward(problem)
    return pipeline.forward(problem, backends.stages(backend))


def _backward(family: str, dout: Tensor | None, dlse: Tensor | None, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments, out, lse = _split_backward(values)
    backend = _checked_backend(family, arguments)
    checks.check_backward_arguments(arguments.q, out, lse, dout, dlse)
    problem = _make_problem(backend, arguments)
    if backend == "reference":
        return reference.backward(problem, out, lse, dout, dlse)
    return pipeline.backward(problem, backends.stages(backend), out, lse, dout, dlse)


def _split_backward(values: tuple[Any, ...]) -> tuple[Arguments, Tensor, Tensor]:
    q, k, v, out, lse, *rest = values
    return Arguments(q, k, v, *rest), out, lse


# ---------------------------------------------------------------------------------------------------------------------
# Fake, autograd, autocast
# ---------------------------------------------------------------------------------------------------------------------
def _forward_fake(family: str, *values: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*values)
    _check(family, arguments)
    q = arguments.q
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=checks.lse_dtype_of(q))


def _backward_fake(
    family: str, dout: Tensor | None, dlse: Tensor | None, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    arguments, out, lse = _split_backward(values)
    _check(family, arguments)
    q, k, v = arguments[:3]
    checks.check_backward_arguments(q, out, lse, dout, dlse)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.softmax_scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(op_name: str, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 9
    q, k, v, topk_idx, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    op = getattr(torch.ops.fsa, f"{op_name}_backward").default
    gradients = op(
        dout, dlse, q, k, v, out, lse, topk_idx, cu_seqlens_q, cu_seqlens_k,
        ctx.block_size, ctx.softmax_scale, ctx.causal,
    )  # fmt: skip
    return (*gradients, *(None,) * 6)


def _autocast(op_name: str, device_type: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.get_autocast_dtype(device_type)
    q, k, v, *rest = arguments
    q, k, v = (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (q, k, v))
    with torch.autocast(device_type, enabled=False):
        out, lse = getattr(torch.ops.fsa, op_name).default(q, k, v, *rest)
    return out, lse


for _family, _op_name in _OP_NAMES.items():
    register_with_backward(
        _family,
        _op_name,
        Definition(_FORWARD_SCHEMA, _forward, _forward_fake),
        Definition(_BACKWARD_SCHEMA, _backward, _backward_fake),
        _autograd,
        _setup_context,
        what="selected_attention",
        autocast=_autocast,
    )
