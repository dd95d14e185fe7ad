"""Selected attention of a few sampled queries and blocks in float64, to measure errors at full size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Queries whose keys are gathered at a time: 128 of them, 1024 keys each of 128 elements, are 134 MB in float64.
_CHUNK = 128


@dataclass(frozen=True)
class Inputs:
    """One causal sequence, softmax_scale = head_dim ** -0.5."""

    q: Tensor  # [tokens, num_heads, head_dim]
    k: Tensor  # [tokens, num_kv_heads, head_dim]
    v: Tensor  # [tokens, num_kv_heads, head_dim]
    dout: Tensor  # [tokens, num_heads, head_dim], the gradient of out
    topk_idx: Tensor  # [num_kv_heads, tokens, topk], int32
    block_size: int

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def heads_of(self, kv_head: int) -> slice:
        """The query heads of a KV head."""
        return slice(kv_head * self.group_size, (kv_head + 1) * self.group_size)


@dataclass(frozen=True)
class Rows:
    """float64 results of some query tokens for the group of one KV head: [tokens, group_size, ...]."""

    out: Tensor
    dq: Tensor
    lse: Tensor  # [tokens, group_size]


def query_rows(inputs: Inputs, kv_head: int, tokens: Tensor) -> Rows:
    """out, dq and lse of query tokens [n]."""
    chunks = [_query_rows(inputs, kv_head, chunk) for chunk in tokens.split(_CHUNK)]
    return Rows(
        out=torch.cat([chunk.out for chunk in chunks]),
        dq=torch.cat([chunk.dq for chunk in chunks]),
        lse=torch.cat([chunk.lse for chunk in chunks]),
    )


def _query_rows(inputs: Inputs, kv_head: int, tokens: Tensor) -> Rows:
    key, visible = _selected_keys(inputs, kv_head, tokens)
    k, v = (x[key, kv_head].double() for x in (inputs.k, inputs.v))  # [tokens, keys, head_dim]
    q, dout = (x[tokens, inputs.heads_of(kv_head)].double() for x in (inputs.q, inputs.dout))
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.mT * scale).masked_fill(~visible[:, None], -torch.inf)
    probs = scores.softmax(-1)
    out = probs @ v
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = probs * (dout @ v.mT - delta)
    return Rows(out=out, dq=dscores @ k * scale, lse=scores.logsumexp(-1))


def _selected_keys(inputs: Inputs, kv_head: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n, topk * block_size] of all slots of tokens [n], and which of them the token sees."""
    block = inputs.topk_idx[kv_head, tokens, :, None].long()
    key = block * inputs.block_size + torch.arange(inputs.block_size, device=block.device)
    visible = (block >= 0) & (key <= tokens[:, None, None])
    return torch.where(visible, key, 0).flatten(1), visible.flatten(1)


def block_gradients(inputs: Inputs, kv_head: int, block: int) -> tuple[Tensor, Tensor]:
    """dk and dv [block_size, head_dim] of the keys of one block (which must be complete)."""
    begin = block * inputs.block_size
    keys = torch.arange(begin, begin + inputs.block_size, device=inputs.k.device)
    k, v = (x[keys, kv_head].double() for x in (inputs.k, inputs.v))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    scale = k.shape[-1] ** -0.5
    tokens = (inputs.topk_idx[kv_head] == block).any(-1).nonzero().squeeze(-1)
    for chunk in tokens[tokens >= begin].split(_CHUNK):
        rows = _query_rows(inputs, kv_head, chunk)
        q, dout = (x[chunk, inputs.heads_of(kv_head)].double() for x in (inputs.q, inputs.dout))
        scores = (q @ k.T * scale).masked_fill(keys > chunk[:, None, None], -torch.inf)
        probs = torch.exp(scores - rows.lse[..., None])
        dscores = probs * (dout @ v.T - (dout * rows.out).sum(-1, keepdim=True))
        dk += torch.einsum("tgk,tgd->kd", dscores, q) * scale
        dv += torch.einsum("tgk,tgd->kd", probs, dout)
    return dk, dv


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|| actual - exact || / || exact ||."""
    return ((actual.double() - exact).norm() / exact.norm()).item()
