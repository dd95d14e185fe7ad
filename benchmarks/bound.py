"""What bounds selected attention with KV blocks outside and queries inside on an H200, in ms, term by term.

Every term is traffic or work that the algorithm cannot avoid divided by a ceiling that was measured on the card. The
terms use different parts of the chip, so the bound of a pass is the largest of them, not their sum:

    products   forward  2 products of 2 * head_dim FLOPs for every visible (query head, key) pair: Q K^T and P V
               backward 5: the scores again, dO V^T, P^T dO, dS^T Q and dS K
    memory     inputs read once, outputs written once; partials (out and lse in the forward, dq in the backward) of
               every (query head, valid slot) written once and read once
    gather     the rows of q (and of dout in the backward) fetched once for every valid slot, out of L2

Pairs that the causal mask hides and unused slots do not count. The bound belongs to partials that travel through DRAM:
a kernel that keeps partials in L2, or that merges slots on chip, can pass under it, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Shape

MATMUL_FLOPS = 790e12  # bf16 matrix products with wgmma
DRAM_BYTES = 4.15e12  # copy, bytes read plus bytes written
L2_GATHER_BYTES = 7.7e12  # random 256-byte rows of a head that lies in L2

_HALF, _FLOAT = 2, 4  # bytes


@dataclass(frozen=True)
class Work:
    """What a selection asks for, per query head of a group, summed over KV heads."""

    slots: int  # (query token, slot) pairs in use
    pairs: int  # (query token, key) pairs that the causal mask lets through


@dataclass(frozen=True)
class Bound:
    """The terms of one pass, in ms."""

    products: float
    memory: float
    gather: float
    flops: float  # of all products, not ms

    @property
    def ms(self) -> float:
        """The bound: the largest term."""
        return max(self.products, self.memory, self.gather)


def count_work(topk_idx: Tensor, block_size: int) -> Work:
    """Counts the work of a causal selection of one sequence: topk_idx [num_kv_heads, tokens, topk]."""
    position = torch.arange(topk_idx.shape[1], device=topk_idx.device)[:, None]
    slots = pairs = 0
    for head in topk_idx:
        keys = (position + 1 - head.long() * block_size).clamp(0, block_size).masked_fill(head < 0, 0)
        slots += int((keys > 0).sum())
        pairs += int(keys.sum())
    return Work(slots, pairs)


def forward_bound(shape: Shape, work: Work) -> Bound:
    """The terms of the forward pass."""
    row = shape.head_dim * _HALF
    partials = 2 * shape.group_size * work.slots * (row + _FLOAT)
    queries = shape.tokens * shape.num_heads
    inputs = queries * row + 2 * _keys(shape) * row + _selection_bytes(shape)
    outputs = queries * (row + _FLOAT)
    return _bound(
        flops=2 * 2 * shape.head_dim * shape.group_size * work.pairs,
        dram=partials + inputs + outputs,
        gathered=shape.group_size * work.slots * row,
    )


def backward_bound(shape: Shape, work: Work) -> Bound:
    """The terms of the backward pass."""
    row = shape.head_dim * _HALF
    partials = 2 * shape.group_size * work.slots * row
    queries = shape.tokens * shape.num_heads
    inputs = queries * (3 * row + _FLOAT) + 2 * _keys(shape) * row + _selection_bytes(shape)  # q, out, dout, lse
    outputs = queries * row + 2 * _keys(shape) * row
    return _bound(
        flops=5 * 2 * shape.head_dim * shape.group_size * work.pairs,
        dram=partials + inputs + outputs,
        gathered=2 * shape.group_size * work.slots * row,
    )


def _keys(shape: Shape) -> int:
    return shape.tokens * shape.num_kv_heads


def _selection_bytes(shape: Shape) -> int:
    return 4 * _keys(shape) * shape.topk


def _bound(flops: int, dram: int, gathered: int) -> Bound:
    return Bound(
        products=1e3 * flops / MATMUL_FLOPS,
        memory=1e3 * dram / DRAM_BYTES,
        gather=1e3 * gathered / L2_GATHER_BYTES,
        flops=float(flops),
    )
