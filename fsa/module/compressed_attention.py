"""Attention to compressed keys: the public function, the operators behind it, and their twin in plain PyTorch.

`torch.ops.fsa.compressed_attention` picks the backend by device; `_compressed_attention_triton` and
`_compressed_attention_reference` are one backend each. Each has a backward operator, `<name>_backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_backward_arguments, lse_dtype_of
from ..pipeline import as_kernel_input
from ..registration import Definition, register_with_backward
from . import checks, cudnn_compressed_attention
from .packed import packed_rows

_FORWARD_SCHEMA = (
    "(Tensor q, Tensor compressed_k, Tensor compressed_v, Tensor cu_seqlens, Tensor compressed_cu_seqlens, "
    "int kernel_size, int kernel_stride, float? softmax_scale) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor compressed_k, Tensor compressed_v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, Tensor compressed_cu_seqlens, int kernel_size, int kernel_stride, float? softmax_scale) "
    "-> (Tensor, Tensor, Tensor)"
)
_OP_NAMES = {
    "auto": "compressed_attention",
    "triton": "_compressed_attention_triton",
    "reference": "_compressed_attention_reference",
}

# The twin's chunks: this many queries, or fewer where their scores would exceed the bytes. Short chunks of queries see
# few windows of other sequences, which are computed only to be masked.
_CHUNK_QUERIES = 256
_CHUNK_BYTES = 32 << 20


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    compressed_cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the compressed keys of its sequence that it sees, the first branch of NSA.

    Query i of a sequence sees window w once the window's last token is there: i >= w * kernel_stride + kernel_size - 1.
    Query head h uses KV head h // group_size. Source: Native Sparse Attention (arXiv 2502.11089), section 3.3.1.

    Args:
        q: [total, num_heads, head_dim], queries of all sequences one after the other.
        compressed_k, compressed_v: [max_windows, num_kv_heads, head_dim], dtype of q. max_windows may exceed the number
            of windows, compressed_cu_seqlens[-1]; rows beyond it are not read.
        cu_seqlens: [batch + 1], int32, where the sequences of q begin, and the total.
        compressed_cu_seqlens: [batch + 1], int32, the same of the windows (`fsa.module.compression.find_windows`).
        kernel_size: tokens of a window, a multiple of kernel_stride.
        kernel_stride: tokens from one window's start to the next one's.
        softmax_scale: positive factor of the scores. None: head_dim ** -0.5.
        backend: "auto" (CUDA tensors: triton if it runs and takes the dtype, else reference; CPU tensors: reference),
            "triton" (fp16, bf16, fp32) or "reference" (also float64). In place of triton, "auto" takes cuDNN where that
            is faster: on Hopper GPUs, for one sequence of 1,536 windows and more in fp16 or bf16 with head_dim up to
            128; in the backward, if lse got no gradient. It takes the sequence to be all of q, without a look at
            cu_seqlens.

    Nothing waits for the GPU. Gradients flow to q, compressed_k and compressed_v through out and lse, once. Under
    autocast the three are cast to its dtype. The same bits come every time, but for the gradients of cuDNN, which adds
    up dq in any order; `torch.use_deterministic_algorithms(True)` leaves it out. From cuDNN, NaN and infinities of
    windows may also reach queries near to those that see them.

    Returns:
        out: [total, num_heads, head_dim], dtype of q. A query that sees no window gets 0 and gives no gradient.
        lse: [num_heads, total], fp32 (float64 for float64 inputs): natural log of the sum of exp(softmax_scale * q·k)
            over the windows seen; -inf for a query that sees none.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value against the contract.
        RuntimeError: the chosen backend is not usable.
    """
    checks.check_choice("backend", backend, checks.BACKENDS)
    checks.check_tensors(
        q=q,
        compressed_k=compressed_k,
        compressed_v=compressed_v,
        cu_seqlens=cu_seqlens,
        compressed_cu_seqlens=compressed_cu_seqlens,
    )
    checks.check_windows(kernel_size, kernel_stride)
    op = getattr(torch.ops.fsa, _OP_NAMES[backend]).default
    out, lse = op(
        q, compressed_k, compressed_v, cu_seqlens, compressed_cu_seqlens, kernel_size, kernel_stride, softmax_scale
    )
    return out, lse


# ---------------------------------------------------------------------------------------------------------------------
# Implementations
# ---------------------------------------------------------------------------------------------------------------------
def resolve_scale(q: Tensor, arguments: Sequence[Any]) -> list[Any]:
    """The arguments, of which softmax_scale is the last, with its default in place of None."""
    *others, softmax_scale = arguments
    return [*others, q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)]


def _check(family: str, values: tuple[Any, ...]) -> None:
    q, compressed_k, compressed_v, cu_seqlens, compressed_cu_seqlens, kernel_size, kernel_stride, softmax_scale = values
    checks.check_windows(kernel_size, kernel_stride)
    checks.check_compressed(q, compressed_k, compressed_v, cu_seqlens, compressed_cu_seqlens, softmax_scale, family)


def _cudnn_takes(family: str, q: Tensor, compressed_k: Tensor, arguments: Sequence[Any]) -> bool:
    cu_seqlens, _, kernel_size, kernel_stride, _ = arguments
    return family == "auto" and cudnn_compressed_attention.takes(
        q, compressed_k, cu_seqlens, kernel_size, kernel_stride
    )


def _forward(family: str, *values: Any) -> tuple[Tensor, Tensor]:
    q, compressed_k, compressed_v, *rest = values
    backend = checks.choose_backend(family, q, "compressed attention")
    _check(family, values)
    arguments = resolve_scale(q, rest)
    if backend == "reference":
        return _reference_forward(q, compressed_k, compressed_v, *arguments)
    q, compressed_k, compressed_v = (as_kernel_input(x) for x in (q, compressed_k, compressed_v))
    if _cudnn_takes(family, q, compressed_k, arguments):
        return cudnn_compressed_attention.forward(q, compressed_k, compressed_v, *arguments)
    from . import triton_compressed_attention  # needs triton

    return triton_compressed_attention.forward(q, compressed_k, compressed_v, *arguments)


def _backward(family: str, dout: Tensor | None, dlse: Tensor | None, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, compressed_k, compressed_v, out, lse, *rest = values
    backend = checks.choose_backend(family, q, "compressed attention")
    _check(family, (q, compressed_k, compressed_v, *rest))
    check_backward_arguments(q, out, lse, dout, dlse)
    arguments = resolve_scale(q, rest)
    dout = torch.zeros_like(out) if dout is None else dout
    if backend == "reference":
        return _reference_backward(dout, dlse, q, compressed_k, compressed_v, out, lse, *arguments)
    q, compressed_k, compressed_v = (as_kernel_input(x) for x in (q, compressed_k, compressed_v))
    # Whatever the forward chose: out and lse mean the same.
    if dlse is None and _cudnn_takes(family, q, compressed_k, arguments):
        return cudnn_compressed_attention.backward(dout, q, compressed_k, compressed_v, out, lse, *arguments)
    from . import triton_compressed_attention  # needs triton

    dout = as_kernel_input(dout)
    return triton_compressed_attention.backward(dout, dlse, q, compressed_k, compressed_v, out, lse, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The twin
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class SeenWindows:
    """Some queries in a row, n of them, and w windows in a row with all those that they see."""

    queries: slice
    windows: slice
    visible: Tensor  # [n, 1, w] bool; the middle one is for the heads of a group
    position: Tensor  # [w] int64, of a window in its sequence, counted in windows

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        """[num_kv_heads, n, group_size, w], -inf where masked; q and k by head (`queries_by_head`, `keys_by_head`)."""
        # Queries and heads of the group as the rows of one matrix: matmul would copy k for every query.
        scores = (q[:, self.queries].flatten(1, 2) @ k[:, self.windows].mT).view(*q[:, self.queries].shape[:3], -1)
        return torch.where(self.visible, scores * softmax_scale, -torch.inf)

    def product(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights [num_kv_heads, n, group_size, w], 0 where masked, @ x [num_kv_heads, max_windows, head_dim]."""
        visible = self.visible.expand(weights.shape[1:]).flatten(0, 1)
        product = _masked_product(weights.flatten(1, 2), visible, x[:, self.windows])
        return product.view(*weights.shape[:3], -1)

    def transposed_product(self, weights: Tensor, x: Tensor) -> Tensor:
        """The same weights, transposed, @ x [num_kv_heads, total, group_size, head_dim]: sums over the queries."""
        visible = self.visible.expand(weights.shape[1:]).flatten(0, 1)
        return _masked_product(weights.flatten(1, 2).mT, visible.mT, x[:, self.queries].flatten(1, 2))


def seen_windows(
    q: Tensor, compressed_k: Tensor, cu_seqlens: Tensor, compressed_cu_seqlens: Tensor, size: int, stride: int
) -> Iterator[SeenWindows]:
    """Every query that sees a window, in chunks of bounded memory."""
    total, max_windows = q.shape[0], compressed_k.shape[0]
    token, window = packed_rows(cu_seqlens, total), packed_rows(compressed_cu_seqlens, max_windows)
    # Windows that each query sees, or a number below 1: those whose last token is at or before it.
    seen = torch.div(token.position + 1 - size, stride, rounding_mode="floor") + 1
    begin = compressed_cu_seqlens.long().clamp(0, max_windows)[token.sequence]
    bytes_per_query = q.shape[1] * max(max_windows, 1) * lse_dtype_of(q).itemsize
    step = max(1, min(_CHUNK_QUERIES, _CHUNK_BYTES // bytes_per_query))
    for start in range(0, total, step):
        queries = slice(start, min(start + step, total))
        windows = slice(0, max_windows)
        if q.device.type == "cpu":  # reading is free there; elsewhere it would wait for the device
            windows = slice(int(begin[queries].min()), min(int((begin + seen)[queries].max()), max_windows))
        if windows.start < windows.stop:
            visible = token.sequence[queries, None] == window.sequence[windows]
            visible &= (window.position[windows] >= 0) & (window.position[windows] < seen[queries, None])
            yield SeenWindows(queries, windows, visible[:, None], window.position[windows])


def queries_by_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """[total, num_heads, n] -> [num_kv_heads, total, group_size, n], in fp32 (float64 for float64)."""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).to(lse_dtype_of(x)).contiguous()


def keys_by_head(x: Tensor) -> Tensor:
    """[max_windows, num_kv_heads, head_dim] -> [num_kv_heads, max_windows, head_dim], in fp32 (or float64)."""
    return x.transpose(0, 1).to(lse_dtype_of(x)).contiguous()


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(like.shape).to(like.dtype).contiguous()


def _masked_product(weights: Tensor, visible: Tensor, x: Tensor) -> Tensor:
    """weights @ x, where weights are 0 outside of `visible`: NaN and infinities in rows of x give NaN to those who see
    them and nothing to the others."""
    nonfinite = ~x.isfinite()
    if x.device.type == "cpu" and not nonfinite.any():  # reading is free there
        return weights @ x
    touched = visible.to(x.dtype) @ nonfinite.to(x.dtype) > 0
    return torch.where(touched, torch.nan, weights @ torch.where(nonfinite, 0, x))


def _reference_forward(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    compressed_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    queries, k, v = queries_by_head(q, compressed_k.shape[1]), keys_by_head(compressed_k), keys_by_head(compressed_v)
    out = torch.zeros_like(queries)
    lse = torch.full_like(queries[..., 0], -torch.inf)  # [num_kv_heads, total, group_size]
    for seen in seen_windows(q, compressed_k, cu_seqlens, compressed_cu_seqlens, kernel_size, kernel_stride):
        scores = seen.scores(queries, k, softmax_scale)
        row_max = scores.amax(-1, keepdim=True)
        row_max = torch.where(row_max == -torch.inf, 0, row_max)
        probs = torch.exp(scores - row_max)
        row_sum = probs.sum(-1, keepdim=True)
        out[:, seen.queries] = torch.where(row_sum == 0, 0, seen.product(probs, v) / row_sum)
        lse[:, seen.queries] = (row_max + torch.log(row_sum)).squeeze(-1)
    return _by_token(out, q), lse.transpose(1, 2).flatten(0, 1).contiguous()


def _reference_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    compressed_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    by_head = functools.partial(queries_by_head, num_kv_heads=compressed_k.shape[1])
    queries, do, k, v = by_head(q), by_head(dout), keys_by_head(compressed_k), keys_by_head(compressed_v)
    log_sums = by_head(lse.T.unsqueeze(-1))
    delta = (do * by_head(out)).sum(-1, keepdim=True)  # [num_kv_heads, total, group_size, 1]
    if dlse is not None:
        delta = delta - by_head(dlse.T.unsqueeze(-1))

    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(k), torch.zeros_like(v)
    for seen in seen_windows(q, compressed_k, cu_seqlens, compressed_cu_seqlens, kernel_size, kernel_stride):
        n, m = seen.queries, seen.windows
        # Masked probabilities are set, not computed: where nothing is seen lse is -inf, and -inf - -inf is NaN.
        probs = torch.exp(seen.scores(queries, k, softmax_scale) - log_sums[:, n])
        probs = torch.where(seen.visible, probs, 0)
        dprobs = (do[:, n].flatten(1, 2) @ v[:, m].mT).view(probs.shape)
        dscores = torch.where(seen.visible, probs * (dprobs - delta[:, n]), 0) * softmax_scale
        dq[:, n] = seen.product(dscores, k)
        dk[:, m] += seen.transposed_product(dscores, queries)
        dv[:, m] += seen.transposed_product(probs, do)
    return _by_token(dq, q), _by_token(dk, compressed_k), _by_token(dv, compressed_v)


# ---------------------------------------------------------------------------------------------------------------------
# Fake, autograd, autocast
# ---------------------------------------------------------------------------------------------------------------------
def _forward_fake(family: str, *values: Any) -> tuple[Tensor, Tensor]:
    _check(family, values)
    q = values[0]
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype_of(q))


def _backward_fake(
    family: str, dout: Tensor | None, dlse: Tensor | None, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, compressed_k, compressed_v, out, lse, *rest = values
    _check(family, (q, compressed_k, compressed_v, *rest))
    check_backward_arguments(q, out, lse, dout, dlse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, compressed_k, compressed_v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel_size, ctx.kernel_stride, ctx.softmax_scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(op_name: str, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 8
    q, compressed_k, compressed_v, cu_seqlens, compressed_cu_seqlens, out, lse = ctx.saved_tensors
    op = getattr(torch.ops.fsa, f"{op_name}_backward").default
    gradients = op(
        dout, dlse, q, compressed_k, compressed_v, out, lse, cu_seqlens, compressed_cu_seqlens,
        ctx.kernel_size, ctx.kernel_stride, ctx.softmax_scale,
    )  # fmt: skip
    return (*gradients, *(None,) * 5)


def _autocast(op_name: str, device_type: str, *values: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.get_autocast_dtype(device_type)
    tensors = (x if x.dtype == torch.float64 else x.to(dtype) for x in values[:3])
    with torch.autocast(device_type, enabled=False):
        out, lse = getattr(torch.ops.fsa, op_name).default(*tensors, *values[3:])
    return out, lse


for _family, _op_name in _OP_NAMES.items():
    register_with_backward(
        _family,
        _op_name,
        Definition(_FORWARD_SCHEMA, _forward, _forward_fake),
        Definition(_BACKWARD_SCHEMA, _backward, _backward_fake),
        _autograd,
        _setup_context,
        what="compressed_attention",
        autocast=_autocast,
    )
