"""Attention to the last tokens: torch's variable-length attention on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from ..checks import check_cu_seqlens, check_devices, check_qkv
from . import checks
from .packed import packed_rows

# torch 2.11 takes fewer KV heads than query heads as they are, later versions where asked to.
_varlen_attn: Any = varlen.varlen_attn
_OPTIONS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(_varlen_attn).parameters else {}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    window_size: int,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token to itself and the window_size - 1 tokens before it in its sequence.

    This is NSA's window of w tokens (arXiv 2502.11089, section 3.3.3). The published FSA module passes window_size to
    flash_attn as the number of tokens before the query, and so attends to one token more.

    Args:
        q: [total, num_heads, head_dim], RoPE applied.
        k, v: [total, num_kv_heads, head_dim], dtype of q; num_heads is a multiple of num_kv_heads.
        cu_seqlens: [batch + 1], int32, where sequences begin, and the total.
        window_size: tokens that a query attends to.
        max_seqlen: a bound on the length of the sequences, or None for the number of all tokens.
        softmax_scale: positive factor of the scores. None: head_dim ** -0.5.
        backend: "auto" (fp16 and bf16 on a GPU: `torch.nn.attention.varlen`; else the reference), or "reference"
            (plain PyTorch on scaled_dot_product_attention).

    Returns:
        [total, num_heads, head_dim], dtype of q. Tokens outside of all sequences get 0 from the reference and values of
        their own on a GPU, where `max_seqlen` must bound their number, too. NaN and infinities may also reach queries
        near to those that see them.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value against the contract.
    """
    checks.check_choice("backend", backend, ("auto", "reference"))
    checks.check_tensors(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    checks.check_count("window_size", window_size)
    check_qkv(q, k, v, _DTYPES, "sliding-window attention", rows=("total", "total"))
    checks.check_same_tokens(q, k)
    check_cu_seqlens(cu_seqlens, cu_seqlens, ("cu_seqlens", "cu_seqlens"))
    check_devices(q, {"k": k, "v": v, "cu_seqlens": cu_seqlens})
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    if backend == "auto" and q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[0]:
        return _varlen(q, k, v, cu_seqlens, window_size, q.shape[0] if max_seqlen is None else max_seqlen, scale)
    return _reference(q, k, v, cu_seqlens, window_size, scale)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int, max_seqlen: int, softmax_scale: float
) -> Tensor:
    # Tokens in no sequence become sequences of their own: what torch leaves uninitialised may be NaN, and gradients of
    # whoever made q, k and v would see it even where those of out are zero.
    total = q.shape[0]
    bounds = nn.functional.pad(cu_seqlens.clamp(0, total), (1, 0))
    bounds = nn.functional.pad(bounds, (0, 1), value=total)
    out: Tensor = _varlen_attn(
        q, k, v, bounds, bounds, max_seqlen, max_seqlen,
        window_size=(window_size - 1, 0), scale=softmax_scale, **_OPTIONS,
    )  # fmt: skip
    return out


def _reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int, softmax_scale: float) -> Tensor:
    """Pieces of window_size queries, each against its own keys and those of the piece before: nothing of the size
    total * total, and shapes that do not depend on cu_seqlens."""
    total, length = q.shape[0], min(window_size, q.shape[0])
    if total == 0:
        return torch.zeros_like(q)
    pieces = -(-total // length)
    row = packed_rows(cu_seqlens, total)
    padding = pieces * length - total

    def own(x: Tensor, value: int = 0) -> Tensor:
        """[total, ...] -> [pieces, length, ...]."""
        return nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, padding), value=value).unflatten(0, (pieces, length))

    def own_and_previous(x: Tensor, value: int = 0) -> Tensor:
        """[total, ...] -> [pieces, 2 * length, ...]."""
        pieces_of_x = own(x, value)
        previous = torch.cat((torch.full_like(pieces_of_x[:1], value), pieces_of_x[:-1]))
        return torch.cat((previous, pieces_of_x), 1)

    sequence = torch.where(row.position < 0, -1, row.sequence)
    behind = torch.arange(length, device=q.device)[:, None] + length - torch.arange(2 * length, device=q.device)
    visible = (behind >= 0) & (
        behind < window_size
    )  # [length, 2 * length]: the key is not after the query, not too far
    same = own(sequence, -1)[:, :, None] == own_and_previous(sequence, -1)[:, None]  # [pieces, length, 2 * length]
    # A row of padding, or of no sequence, sees itself: a softmax over nothing would be NaN.
    visible = (visible & same) | (behind == 0)
    out = nn.functional.scaled_dot_product_attention(
        own(q).transpose(1, 2),  # [pieces, num_heads, length, head_dim]
        own_and_previous(k).transpose(1, 2),
        own_and_previous(v).transpose(1, 2),
        attn_mask=visible[:, None],
        scale=softmax_scale,
        enable_gqa=True,
    )
    out = out.transpose(1, 2).flatten(0, 1)[:total]
    return torch.where(sequence[:, None, None] < 0, 0, out)
