"""The definition of selected attention in plain PyTorch, for any device: gather the selected keys, masked softmax.

It is the CPU implementation of the op and what the other backends are compared with. Queries go in chunks, so memory
stays bounded whatever the input. Half precision is computed in fp32, float64 in float64. Bitwise deterministic on the
CPU; on a GPU the backward's index_add_ uses atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import lse_dtype_of
from .problem import Problem

# Gathered keys of a chunk, in bytes. What is gathered stays in the cache until the matrix products read it: on a CPU
# 1 to 8 MiB measure alike, 16 MiB is about 1.5 times slower, and much larger ones spend their time on fresh pages.
_GATHER_BYTES = 2 << 20


class TokenBounds(NamedTuple):
    """Per query token, [total_q] int64 each."""

    start_k: Tensor  # first key of the token's sequence
    len_k: Tensor  # keys of the token's sequence
    last_key: Tensor  # last key that the mask lets it see, counted from start_k; negative if none


def token_bounds(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int, causal: bool) -> TokenBounds:
    """The sequence of each query token and what the mask lets it see.

    Bounds are clamped, so that no value of cu_seqlens leads out of the tensors.
    """
    bounds_q = cu_seqlens_q.long().clamp(0, total_q)
    bounds_k = cu_seqlens_k.long().clamp(0, total_k)
    token = torch.arange(total_q, device=cu_seqlens_q.device)
    sequence = (torch.searchsorted(bounds_q[:-1].contiguous(), token, right=True) - 1).clamp(min=0)
    start_q, end_q = bounds_q[sequence], bounds_q[sequence + 1]
    start_k, end_k = bounds_k[sequence], bounds_k[sequence + 1]
    len_q, len_k = (end_q - start_q).clamp(min=0), (end_k - start_k).clamp(min=0)
    last_key = len_k - 1
    if causal:
        last_key = torch.minimum(last_key, token - start_q + len_k - len_q)
    inside = (start_q <= token) & (token < end_q)
    return TokenBounds(start_k, len_k, torch.where(inside, last_key, -1))


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Selected attention.

    Returns:
        out: [total_q, num_heads, head_dim], dtype of q; 0 where a query attends to nothing.
        lse: [num_heads, total_q], fp32 (float64 for float64 inputs); -inf where a query attends to nothing.
    """
    layout = _Layout(problem)
    q = layout.by_head(problem.q)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for selected in _gather_chunks(layout):
        scores = selected.scores(q[selected.rows])
        row_max = scores.amax(-1, keepdim=True)
        probs = torch.exp(scores - torch.where(row_max == -torch.inf, 0, row_max))
        row_sum = probs.sum(-1, keepdim=True)
        out[selected.rows] = torch.where(row_sum == 0, 0, probs @ selected.v / row_sum)
        lse[selected.rows] = (row_max + torch.log(row_sum)).squeeze(-1)
    return layout.by_token(out), lse.transpose(1, 2).flatten(0, 1).contiguous()


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each with the shape and dtype of its input.

    Args:
        problem: as in the forward.
        out, lse: what the forward returned.
        dout: [total_q, num_heads, head_dim], gradient of out, or None for zero.
        dlse: [num_heads, total_q], gradient of lse, or None for zero.
    """
    layout = _Layout(problem)
    q = layout.by_head(problem.q)
    dout = torch.zeros_like(q) if dout is None else layout.by_head(dout)
    lse = layout.by_head(lse.T.unsqueeze(-1))
    delta = (dout * layout.by_head(out)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - layout.by_head(dlse.T.unsqueeze(-1))

    dq, dk, dv = torch.empty_like(q), torch.zeros_like(layout.k), torch.zeros_like(layout.v)
    for selected in _gather_chunks(layout):
        rows, head = selected.rows, selected.rows[0]
        # Masked probabilities are set, not computed: where nothing is attended lse is -inf, and -inf - -inf is NaN.
        probs = torch.where(selected.visible, torch.exp(selected.scores(q[rows]) - lse[rows]), 0)
        dprobs = dout[rows] @ selected.v.mT
        dscores = torch.where(selected.visible, probs * (dprobs - delta[rows]), 0) * problem.softmax_scale
        dq[rows] = dscores @ selected.k
        dk[head].index_add_(0, selected.keys, (dscores.mT @ q[rows]).flatten(0, 1))
        dv[head].index_add_(0, selected.keys, (probs.mT @ dout[rows]).flatten(0, 1))
    return layout.by_token(dq), layout.by_token(dk[:, :-1, None]), layout.by_token(dv[:, :-1, None])


class _Layout:
    """Inputs by KV head, in the dtype of the computation."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.dtype = lse_dtype_of(problem.q)
        self.k = self._with_zero_row(problem.k)  # [num_kv_heads, total_k + 1, head_dim]
        self.v = self._with_zero_row(problem.v)
        self.bounds = token_bounds(
            problem.cu_seqlens_q, problem.cu_seqlens_k, problem.total_q, problem.total_k, problem.causal
        )

    def by_head(self, rows: Tensor) -> Tensor:
        """[total_q, num_heads, n] -> [num_kv_heads, total_q, group_size, n]."""
        total_q, _, n = rows.shape
        grouped = rows.reshape(total_q, self.problem.num_kv_heads, self.problem.group_size, n)
        return grouped.transpose(0, 1).contiguous().to(self.dtype)

    def by_token(self, rows: Tensor) -> Tensor:
        """[num_kv_heads, tokens, group, head_dim] -> [tokens, num_kv_heads * group, head_dim], dtype of the inputs."""
        return rows.transpose(0, 1).flatten(1, 2).contiguous().to(self.problem.q.dtype)

    def _with_zero_row(self, keys: Tensor) -> Tensor:
        # Row total_k stands for every masked key: whatever a masked key holds, NaN included, is never read.
        rows = keys.new_zeros((self.problem.num_kv_heads, self.problem.total_k + 1, keys.shape[2]), dtype=self.dtype)
        rows[:, :-1] = keys.transpose(0, 1)
        return rows


@dataclass(frozen=True, eq=False)
class _Selected:
    """What some query tokens of one KV head select; n tokens, m = topk * block_size keys each."""

    rows: tuple[int, slice]  # KV head, query tokens
    keys: Tensor  # [n * m] int64, rows of k and v; total_k where masked
    visible: Tensor  # [n, 1, m] bool
    k: Tensor  # [n, m, head_dim]
    v: Tensor  # [n, m, head_dim]
    softmax_scale: float

    def scores(self, q: Tensor) -> Tensor:
        """[n, group_size, m], -inf where masked; q is [n, group_size, head_dim]."""
        return torch.where(self.visible, q @ self.k.mT * self.softmax_scale, -torch.inf)


def _gather_chunks(layout: _Layout) -> Iterator[_Selected]:
    """Every KV head and query token once, as many tokens at a time as the gathered keys' bound allows."""
    problem, bounds = layout.problem, layout.bounds
    keys_per_query = problem.topk * problem.block_size
    step = max(1, _GATHER_BYTES // (keys_per_query * problem.head_dim * layout.dtype.itemsize))
    offset_in_block = torch.arange(problem.block_size, device=problem.q.device)
    for head in range(problem.num_kv_heads):
        for begin in range(0, problem.total_q, step):
            tokens = slice(begin, min(begin + step, problem.total_q))
            block = problem.topk_idx[head, tokens, :, None].long()
            key = block * problem.block_size + offset_in_block
            visible = (block >= 0) & (key <= bounds.last_key[tokens, None, None])
            keys = torch.where(visible, key + bounds.start_k[tokens, None, None], problem.total_k).flatten()
            yield _Selected(
                rows=(head, tokens),
                keys=keys,
                visible=visible.reshape(-1, 1, keys_per_query),
                k=layout.k[head].index_select(0, keys).view(-1, keys_per_query, problem.head_dim),
                v=layout.v[head].index_select(0, keys).view(-1, keys_per_query, problem.head_dim),
                softmax_scale=problem.softmax_scale,
            )
