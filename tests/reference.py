"""The definition of selected attention: dense, in float64, slow and obvious. What every backend is compared with.

`dense` writes down how often each query attends to each key (a matrix [num_kv_heads, total_q, total_k]: a block that is
listed twice counts twice) and does softmax attention with these multiplicities, forward and backward, formula by
formula. `dense_tokens` and `dense_block` give some rows of the same answer for problems whose matrix would not fit.

The same formulas run in three arithmetics:
EXACT                    float64: the answer.
torch_arithmetic(dtype)  what plain PyTorch gives in the dtype of a test: operands of matrix products and results are
                         rounded to it, sums are made in fp32. The yardstick of the tolerance rule (tolerances.py), and
                         a stricter one than eager attention, which rounds the scores to the dtype as well.
MAGNITUDES               float64, every term replaced by its absolute value: how large the numbers are whose sum is a
                         result, and so what fp32 arithmetic can do to it when they cancel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_TOKENS_AT_ONCE = 256
_Term = TypeVar("_Term", Tensor, float)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one call, and the gradients of its two results."""

    q: Tensor  # [total_q, num_heads, head_dim]
    k: Tensor  # [total_k, num_kv_heads, head_dim]
    v: Tensor  # [total_k, num_kv_heads, head_dim]
    topk_idx: Tensor  # [num_kv_heads, total_q, topk], int32
    cu_seqlens_q: Tensor  # [batch + 1], int32
    cu_seqlens_k: Tensor  # [batch + 1], int32
    block_size: int
    softmax_scale: float | None
    causal: bool
    dout: Tensor  # [total_q, num_heads, head_dim]
    dlse: Tensor  # [num_heads, total_q], fp32 (float64 for float64 inputs)

    @property
    def scale(self) -> float:
        """softmax_scale, resolved."""
        return self.q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.k.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @functools.cached_property
    def places(self) -> Places:
        """Where tokens stand, by cu_seqlens."""
        return _places(self)

    def replace(self, **changes: object) -> Inputs:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """A copy with every tensor changed."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return self.replace(**{name: change(x) for name, x in fields.items() if isinstance(x, Tensor)})


@dataclass(frozen=True, eq=False)
class Results:
    """The two results of a call and its three gradients."""

    out: Tensor  # [total_q, num_heads, head_dim]
    lse: Tensor  # [num_heads, total_q], natural log
    dq: Tensor  # [total_q, num_heads, head_dim]
    dk: Tensor  # [total_k, num_kv_heads, head_dim]
    dv: Tensor  # [total_k, num_kv_heads, head_dim]


@dataclass(frozen=True)
class Arithmetic:
    """Sums are made in `compute`; operands of matrix products and results are rounded to `operand`."""

    compute: torch.dtype
    operand: torch.dtype
    magnitudes: bool = False

    def rounded(self, x: Tensor) -> Tensor:
        """x rounded to `operand`, in `compute`."""
        return x.to(self.operand).to(self.compute)

    def term(self, x: _Term) -> _Term:
        """x, or its absolute value where magnitudes are wanted."""
        return abs(x) if self.magnitudes else x  # type: ignore[return-value]


EXACT = Arithmetic(torch.float64, torch.float64)
MAGNITUDES = Arithmetic(torch.float64, torch.float64, magnitudes=True)


def torch_arithmetic(dtype: torch.dtype) -> Arithmetic:
    """What plain PyTorch does with tensors of this dtype."""
    return Arithmetic(torch.float64 if dtype == torch.float64 else torch.float32, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Who attends to what
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Places:
    """Where tokens stand. Sequence -1 (query) or -2 (key): in no sequence."""

    query_sequence: Tensor  # [total_q]
    query_first_key: Tensor  # [total_q], row of k where the query's sequence begins
    query_last_key: Tensor  # [total_q], the last key it sees, counted from there; below 0: none
    key_sequence: Tensor  # [total_k]
    key_place: Tensor  # [total_k], counted from the beginning of its sequence


def _bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def _places(inputs: Inputs) -> Places:
    def filled(length: int, value: int) -> Tensor:
        return torch.full((length,), value, dtype=torch.int64, device=inputs.q.device)

    total_q, total_k = inputs.q.shape[0], inputs.k.shape[0]
    places = Places(
        filled(total_q, -1), filled(total_q, 0), filled(total_q, -1), filled(total_k, -2), filled(total_k, 0)
    )
    bounds = zip(_bounds(inputs.cu_seqlens_q), _bounds(inputs.cu_seqlens_k), strict=True)
    for sequence, ((q_begin, q_end), (k_begin, k_end)) in enumerate(bounds):
        len_q, len_k = q_end - q_begin, k_end - k_begin
        query_place = torch.arange(len_q, device=inputs.q.device)
        places.query_sequence[q_begin:q_end] = sequence
        places.query_first_key[q_begin:q_end] = k_begin
        places.query_last_key[q_begin:q_end] = query_place + len_k - len_q if inputs.causal else len_k - 1
        places.key_sequence[k_begin:k_end] = sequence
        places.key_place[k_begin:k_end] = torch.arange(len_k, device=inputs.q.device)
    return places


def multiplicity(inputs: Inputs) -> Tensor:
    """How often each query attends to each key: int64 [num_kv_heads, total_q, total_k]."""
    places = inputs.places
    visible = places.query_sequence[:, None] == places.key_sequence
    visible &= places.key_place <= places.query_last_key[:, None]
    counts = torch.zeros((inputs.num_kv_heads, *visible.shape), dtype=torch.int64, device=visible.device)
    for block in inputs.topk_idx.long().unbind(-1):  # [num_kv_heads, total_q]
        counts += (places.key_place // inputs.block_size == block[..., None]) & visible
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Softmax attention with multiplicities: q, dout [..., M, D], k, v [..., N, D], counts [..., M, N]
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Rows:
    """What the forward leaves to the backward."""

    out: Tensor  # [..., M, D]
    lse: Tensor  # [..., M]
    log_normaliser: Tensor  # [..., M], the lse itself (`lse` may be its magnitude)


@dataclass(frozen=True, eq=False)
class _Factors:
    """What the matrix products of the backward multiply with dout, q and k."""

    probs: Tensor  # [..., M, N]
    dscores: Tensor  # [..., M, N], without the factor softmax_scale


def _visible_product(weights: Tensor, counts: Tensor, x: Tensor) -> Tensor:
    """weights @ x over the pairs with counts > 0 alone: a NaN in a row of x reaches only who attends to that row."""
    weights = torch.where(counts > 0, weights, 0)
    if x.isfinite().all():
        return weights @ x
    seen = (counts > 0).expand(weights.shape)
    rows = range(weights.shape[-2])
    terms = (torch.where(seen[..., m, :, None], weights[..., m, :, None] * x, 0) for m in rows)
    return torch.stack([term.sum(-2) for term in terms], -2)


def _logits(q: Tensor, k: Tensor, counts: Tensor, scale: float) -> Tensor:
    """softmax_scale * q.k + log(multiplicity): attending c times is attending once with c times the weight."""
    return torch.where(counts > 0, q @ k.mT * scale + counts.to(q.dtype).log(), -torch.inf)


def _score_size(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """An fp32 score errs in proportion to this, and exp(score) relatively by as much as the score absolutely."""
    return abs(scale) * (q.abs() @ k.abs().mT)


def _forward(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float, arithmetic: Arithmetic) -> _Rows:
    logits = _logits(q, k, counts, scale)
    probs = torch.where(counts > 0, logits.softmax(-1), 0)
    lse = log_normaliser = logits.logsumexp(-1)
    if arithmetic.magnitudes:
        probs = torch.where(counts > 0, probs * (1 + _score_size(q, k, scale)), 0)
        lse = lse.abs() + probs.sum(-1)
    out = _visible_product(arithmetic.rounded(probs), counts, arithmetic.term(v))
    return _Rows(arithmetic.rounded(out), lse, log_normaliser)


def _backward_factors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    scale: float,
    rows: _Rows,
    dout: Tensor,
    dlse: Tensor,
    arithmetic: Arithmetic,
) -> _Factors:
    probs = torch.where(counts > 0, (_logits(q, k, counts, scale) - rows.log_normaliser[..., None]).exp(), 0)
    if arithmetic.magnitudes:
        probs = torch.where(counts > 0, probs * (1 + _score_size(q, k, scale)), 0)
        dout, dlse, v = dout.abs(), -dlse.abs(), v.abs()
    dprobs = dout @ v.mT
    delta = (dout * rows.out).sum(-1, keepdim=True) - dlse[..., None]
    dscores = probs * (dprobs + delta if arithmetic.magnitudes else dprobs - delta)
    return _Factors(arithmetic.rounded(probs), arithmetic.rounded(torch.where(counts > 0, dscores, 0)))


def _query_gradient(factors: _Factors, counts: Tensor, k: Tensor, scale: float, arithmetic: Arithmetic) -> Tensor:
    dq = _visible_product(factors.dscores, counts, arithmetic.term(k)) * arithmetic.term(scale)
    return arithmetic.rounded(dq)


def _key_gradients(
    factors: _Factors, counts: Tensor, q: Tensor, dout: Tensor, scale: float, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """dk and dv [..., N, D] of each query head by itself, not yet rounded."""
    dk = _visible_product(factors.dscores.mT, counts.mT, arithmetic.term(q)) * arithmetic.term(scale)
    dv = _visible_product(factors.probs.mT, counts.mT, arithmetic.term(dout))
    return dk, dv


# ---------------------------------------------------------------------------------------------------------------------
# A whole problem
# ---------------------------------------------------------------------------------------------------------------------
def dense(inputs: Inputs, arithmetic: Arithmetic = EXACT) -> Results:
    """All results of a problem."""
    scale = inputs.scale

    def heads_first(x: Tensor) -> Tensor:  # [num_kv_heads, group_size, tokens, head_dim]
        return arithmetic.rounded(x.detach()).unflatten(1, (inputs.num_kv_heads, -1)).permute(1, 2, 0, 3)

    def tokens_first(x: Tensor) -> Tensor:
        return arithmetic.rounded(x).flatten(0, 1).transpose(0, 1)

    q, k, v, dout = (heads_first(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    dlse = inputs.dlse.to(arithmetic.compute).unflatten(0, (inputs.num_kv_heads, -1))
    counts = multiplicity(inputs)[:, None]  # one for all query heads of a group
    rows = _forward(q, k, v, counts, scale, arithmetic)
    factors = _backward_factors(q, k, v, counts, scale, rows, dout, dlse, arithmetic)
    dk, dv = _key_gradients(factors, counts, q, dout, scale, arithmetic)
    return Results(
        out=tokens_first(rows.out),
        lse=rows.lse.flatten(0, 1),
        dq=tokens_first(_query_gradient(factors, counts, k, scale, arithmetic)),
        dk=tokens_first(dk.sum(1, keepdim=True)),
        dv=tokens_first(dv.sum(1, keepdim=True)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Some rows of a problem, by gathering what they need
# ---------------------------------------------------------------------------------------------------------------------
def _attend_tokens(inputs: Inputs, head: int, tokens: Tensor, arithmetic: Arithmetic) -> tuple[_Rows, Tensor]:
    """One KV head's rows [tokens, group_size, head_dim] of some query tokens, and dq."""
    places = inputs.places
    group = slice(head * inputs.group_size, (head + 1) * inputs.group_size)
    offsets = torch.arange(inputs.block_size, device=tokens.device)
    parts = []
    for token in tokens.split(_TOKENS_AT_ONCE):
        key = (inputs.topk_idx[head, token].long()[..., None] * inputs.block_size + offsets).flatten(1)
        counts = ((key >= 0) & (key <= places.query_last_key[token][:, None])).long()  # each slot by itself
        row = torch.where(counts > 0, key + places.query_first_key[token][:, None], 0)
        q, dout = (arithmetic.rounded(x.detach()[token, group]) for x in (inputs.q, inputs.dout))
        k, v = (arithmetic.rounded(x.detach()[row, head]) for x in (inputs.k, inputs.v))
        dlse = inputs.dlse[group, token].mT.to(arithmetic.compute)
        counts = counts[:, None]
        rows = _forward(q, k, v, counts, inputs.scale, arithmetic)
        factors = _backward_factors(q, k, v, counts, inputs.scale, rows, dout, dlse, arithmetic)
        dq = _query_gradient(factors, counts, k, inputs.scale, arithmetic)
        parts.append((rows.out, rows.lse, rows.log_normaliser, dq))
    out, lse, log_normaliser, dq = (torch.cat(part) for part in zip(*parts, strict=True))
    return _Rows(out, lse, log_normaliser), dq


def dense_tokens(inputs: Inputs, tokens: Tensor, arithmetic: Arithmetic = EXACT) -> tuple[Tensor, Tensor, Tensor]:
    """out [n, num_heads, head_dim], lse [num_heads, n] and dq [n, num_heads, head_dim] of n query tokens."""
    heads = [_attend_tokens(inputs, head, tokens, arithmetic) for head in range(inputs.num_kv_heads)]
    out = torch.cat([rows.out for rows, _ in heads], 1)
    lse = torch.cat([rows.lse for rows, _ in heads], 1).mT
    return out, lse, torch.cat([dq for _, dq in heads], 1)


def dense_block(
    inputs: Inputs, head: int, sequence: int, block: int, arithmetic: Arithmetic = EXACT
) -> tuple[slice, Tensor, Tensor]:
    """One KV head's block: its rows of k, and their dk and dv [keys, head_dim], from all queries that selected it."""
    places = inputs.places
    k_begin, k_end = _bounds(inputs.cu_seqlens_k)[sequence]
    first = block * inputs.block_size
    keys = slice(k_begin + first, min(k_begin + first + inputs.block_size, k_end))
    times = (inputs.topk_idx[head] == block).sum(-1)
    tokens = ((times > 0) & (places.query_sequence == sequence)).nonzero().squeeze(-1)
    rows, _ = _attend_tokens(inputs, head, tokens, arithmetic)
    place = torch.arange(first, first + keys.stop - keys.start, device=tokens.device)
    counts = times[tokens][:, None] * (place <= places.query_last_key[tokens][:, None])

    group = slice(head * inputs.group_size, (head + 1) * inputs.group_size)
    q, dout = (arithmetic.rounded(x.detach()[tokens, group]).transpose(0, 1) for x in (inputs.q, inputs.dout))
    k, v = (arithmetic.rounded(x.detach()[keys, head]) for x in (inputs.k, inputs.v))
    rows = _Rows(rows.out.transpose(0, 1), rows.lse.mT, rows.log_normaliser.mT)
    dlse = inputs.dlse[group, tokens].to(arithmetic.compute)
    factors = _backward_factors(q, k, v, counts, inputs.scale, rows, dout, dlse, arithmetic)
    dk, dv = _key_gradients(factors, counts, q, dout, inputs.scale, arithmetic)
    return keys, arithmetic.rounded(dk.sum(0)), arithmetic.rounded(dv.sum(0))
