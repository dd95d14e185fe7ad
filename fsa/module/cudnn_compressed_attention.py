"""Compressed attention of one sequence by cuDNN's fused attention, as torch ships it, on Hopper GPUs.

Windows have w tokens and begin every s tokens: token p sees windows 0 to (p - (w - 1)) // s, rounded down. The tokens
before w - 1 see none. Count the others from there, and write their number as s * i + r with 0 <= r < s: such a token
sees windows 0 to i. So the tokens of one residue r, one after the other, see the windows under the mask of ordinary
causal attention: row i sees columns 0 to i. The residues are the batch of one such attention, in which q is a view and
all residues share the keys. Fewer than s tokens are left behind the last whole row of residues; they see all windows,
and plain PyTorch attends for them.

`takes` says which calls may come here; `forward` and `backward` are `triton_compressed_attention`'s for those.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import lse_dtype_of
from ..pipeline import as_kernel_input
from ..tiling import ceil_div
from ..workspace import get_workspace_limit

# On an H100 Triton is 7 % faster with 1,022 rows of 16 residues and 16 heads, cuDNN 12 to 20 % with 4,094.
_MIN_ROWS = 1536
_MAX_HEAD_DIM = 128
_MAX_ELEMENTS = 1 << 31  # of q: cuDNN has not been tried with offsets beyond
# Bytes of a call in the backward, as multiples of its q: dq, and the workspace (dq in fp32, dk and dv of every query
# head).
_BACKWARD_FACTOR = 1 + 4


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a sequence: `first` that see nothing, `rows` for each of `stride` residues, and a tail."""

    first: int
    stride: int
    rows: int
    tail: int

    @classmethod
    def of(cls, total: int, kernel_size: int, kernel_stride: int) -> _Tokens:
        """The tokens of a sequence of this length."""
        first = min(kernel_size - 1, total)
        rows, tail = divmod(total - first, kernel_stride)
        return cls(first, kernel_stride, rows, tail)

    @property
    def windows(self) -> int:
        """Windows that are complete."""
        return self.rows + (self.tail > 0)

    @property
    def end(self) -> int:
        """Where the tail begins."""
        return self.first + self.stride * self.rows

    def residues(self, x: Tensor) -> Tensor:
        """A view of the tokens before the tail: [total, heads, head_dim] -> [stride, heads, rows, head_dim]."""
        return x[self.first : self.end].unflatten(0, (self.rows, self.stride)).permute(1, 2, 0, 3)

    def keys(self, x: Tensor, residues: int) -> Tensor:
        """A view: [max_windows, num_kv_heads, head_dim] -> [residues, num_kv_heads, rows, head_dim]."""
        return x[: self.rows].transpose(0, 1).expand(residues, -1, -1, -1)

    def calls(self, bytes_per_residue: int) -> Iterator[slice]:
        """All residues, as many at a time as the workspace limit allows, in calls of about the same size."""
        at_once = max(1, min(self.stride, get_workspace_limit() // bytes_per_residue))
        step = ceil_div(self.stride, ceil_div(self.stride, at_once))
        for begin in range(0, self.stride, step):
            yield slice(begin, min(begin + step, self.stride))


def takes(q: Tensor, compressed_k: Tensor, cu_seqlens: Tensor, kernel_size: int, kernel_stride: int) -> bool:
    """Whether a call may come here, by what is known without waiting for the device.

    cuDNN's backward adds up dq in any order, so nothing comes here under `torch.use_deterministic_algorithms(True)`;
    nor where `torch.backends.cuda.enable_cudnn_sdp(False)` was called.
    """
    if q.device.type != "cuda" or cu_seqlens.numel() != 2 or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    tokens = _Tokens.of(q.shape[0], kernel_size, kernel_stride)
    return (
        tokens.rows >= _MIN_ROWS
        and tokens.windows <= compressed_k.shape[0]
        and q.shape[2] % 8 == 0
        and q.shape[2] <= _MAX_HEAD_DIM
        and q.numel() < _MAX_ELEMENTS
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and _runs_on(q.device)
    )


@functools.cache
def _runs_on(device: torch.device) -> bool:
    # Where it has been measured.
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def forward(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    compressed_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of every query token to the windows that it sees.

    Args:
        q: [total, num_heads, head_dim], one sequence. It and the next two are as `fsa.pipeline.as_kernel_input` leaves
            them.
        compressed_k, compressed_v: [max_windows, num_kv_heads, head_dim]; rows behind the last window are never read.
        cu_seqlens, compressed_cu_seqlens: not read, for they follow from the shapes.
        kernel_size, kernel_stride: tokens a window, and from one window to the next.
        softmax_scale: positive factor of the scores.

    Returns:
        out: [total, num_heads, head_dim], dtype of q; 0 for a query that sees no window.
        lse: [num_heads, total], fp32, natural log; -inf for a query that sees no window.
    """
    tokens = _Tokens.of(q.shape[0], kernel_size, kernel_stride)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype_of(q))
    out[: tokens.first].zero_()
    lse[:, : tokens.first].fill_(-torch.inf)

    queries, outs, log_sums = tokens.residues(q), tokens.residues(out), _log_sums(lse, tokens)
    for residues in tokens.calls(_bytes(queries[0]) + _bytes(log_sums[0])):
        k, v = (tokens.keys(x, residues.stop - residues.start) for x in (compressed_k, compressed_v))
        outs[residues], log_sums[residues] = _attend(queries[residues], k, v, softmax_scale)
    if tokens.tail:
        k, v = (x[: tokens.windows] for x in (compressed_k, compressed_v))
        out[tokens.end :], lse[:, tokens.end :] = _attend_to_all(q[tokens.end :], k, v, softmax_scale)
    return out, lse


def backward(
    dout: Tensor,
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
    """Gradients of q, compressed_k and compressed_v, of a loss that does not depend on lse.

    Args:
        dout: [total, num_heads, head_dim], gradient of out.
        out, lse: what a forward of any backend returned; the other arguments are the forward's.

    Returns:
        dq, dk, dv: shapes and dtype of q, compressed_k, compressed_v; rows behind the last window are zero.

    Beside these it allocates dk and dv in fp32, a copy of dout where that is not contiguous, the scores of the tail,
    and what the calls of cuDNN take: the workspace limit, or one residue's if that is more.
    """
    # torch finds the plan that it built for an earlier call by the layouts of q, k and v alone: those of the other
    # tensors must follow from them.
    dout, out = (as_kernel_input(x.contiguous()) for x in (dout, out))
    tokens = _Tokens.of(q.shape[0], kernel_size, kernel_stride)
    dq = q.new_empty(q.shape)
    dq[: tokens.first].zero_()
    # Sums over the residues, and the tail.
    _, num_kv_heads, head_dim = compressed_k.shape
    dk_sum, dv_sum = (q.new_zeros((num_kv_heads, tokens.windows, head_dim), dtype=lse_dtype_of(q)) for _ in range(2))

    queries, dqs, outs, douts = (tokens.residues(x) for x in (q, dq, out, dout))
    log_sums = _log_sums(lse, tokens)
    key_bytes = 2 * _bytes(compressed_k[: tokens.rows])  # dk and dv
    for residues in tokens.calls(_BACKWARD_FACTOR * _bytes(queries[0]) + key_bytes + _bytes(log_sums[0])):
        k, v = (tokens.keys(x, residues.stop - residues.start) for x in (compressed_k, compressed_v))
        dqs[residues], dk, dv = _attend_backward(
            douts[residues],
            queries[residues],
            k,
            v,
            outs[residues],
            log_sums[residues].clone(memory_format=torch.contiguous_format),
            softmax_scale,
        )
        dk_sum[:, : tokens.rows] += dk.sum(0, dtype=dk_sum.dtype)
        dv_sum[:, : tokens.rows] += dv.sum(0, dtype=dv_sum.dtype)
        del dk, dv  # before the next call gets its own
    if tokens.tail:
        tail = slice(tokens.end, None)
        k, v = (x[: tokens.windows] for x in (compressed_k, compressed_v))
        dq[tail], dk, dv = _attend_to_all_backward(dout[tail], q[tail], k, v, out[tail], lse[:, tail], softmax_scale)
        dk_sum += dk
        dv_sum += dv
    return dq, _by_window(dk_sum, compressed_k), _by_window(dv_sum, compressed_v)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _log_sums(lse: Tensor, tokens: _Tokens) -> Tensor:
    """A view of the tokens before the tail: [num_heads, total] -> [stride, num_heads, rows]."""
    return lse[:, tokens.first : tokens.end].unflatten(1, (tokens.rows, tokens.stride)).permute(2, 0, 1)


def _by_window(x: Tensor, like: Tensor) -> Tensor:
    """[num_kv_heads, windows, head_dim] -> [max_windows, num_kv_heads, head_dim], zero behind the last window."""
    rows = like.new_zeros(like.shape)
    rows[: x.shape[1]] = x.transpose(0, 1)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# cuDNN
# ---------------------------------------------------------------------------------------------------------------------
def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: out like q [batch, num_heads, rows, head_dim], and lse [batch, num_heads, rows]."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, True, scale=softmax_scale
    )
    return out, lse.view(q.shape[:3])


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients dq, dk and dv; lse is contiguous."""
    unused = q.new_empty((), dtype=torch.int64)  # seed and offset of a dropout that there is none of
    rows = q.shape[2]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, rows, rows, 0.0, True,
        scale=softmax_scale,
    )  # fmt: skip
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------------------------
# The tail
# ---------------------------------------------------------------------------------------------------------------------
def _by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """[n, heads, m] -> [num_kv_heads, n * heads / num_kv_heads, m], in fp32 (float64 for float64)."""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2).to(lse_dtype_of(x))


def _by_token(x: Tensor, num_tokens: int) -> Tensor:
    """The inverse, in the same dtype: [num_kv_heads, num_tokens * group_size, m] -> [num_tokens, num_heads, m]."""
    return x.unflatten(1, (num_tokens, -1)).transpose(0, 1).flatten(1, 2)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a few tokens to all windows: out [n, num_heads, head_dim], lse [num_heads, n], both in fp32."""
    queries, keys, values = (_by_kv_head(x, k.shape[1]) for x in (q, k, v))
    scores = queries @ keys.mT * softmax_scale
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.exp(scores - lse) @ values
    return _by_token(out, len(q)), _by_token(lse, len(q)).squeeze(-1).T


def _attend_to_all_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients in fp32: dq like q, dk and dv [num_kv_heads, windows, head_dim]."""
    tensors = (dout, q, k, v, out, lse.T.unsqueeze(-1))
    do, queries, keys, values, outputs, log_sums = (_by_kv_head(x, k.shape[1]) for x in tensors)
    probs = torch.exp(queries @ keys.mT * softmax_scale - log_sums)
    delta = (do * outputs).sum(-1, keepdim=True)
    dscores = probs * (do @ values.mT - delta) * softmax_scale
    return _by_token(dscores @ keys, len(q)), dscores.mT @ queries, probs.mT @ do
