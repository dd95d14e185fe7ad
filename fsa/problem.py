"""What is passed around: the arguments of a call, the problem they state, one chunk of it, and the chunk's plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of the op, in the order of its schema, as the caller gave them."""

    q: Tensor
    k: Tensor
    v: Tensor
    topk_idx: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    block_size: int
    softmax_scale: float | None
    causal: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of one call, checked (`fsa.checks`) and resolved.

    `topk_idx` and the cu_seqlens are contiguous; `q`, `k` and `v` have a contiguous last dimension, other strides are
    free multiples of 16 bytes.
    """

    q: Tensor  # [total_q, num_heads, head_dim]
    k: Tensor  # [total_k, num_kv_heads, head_dim], dtype of q
    v: Tensor  # [total_k, num_kv_heads, head_dim], dtype of q
    topk_idx: Tensor  # [num_kv_heads, total_q, topk], int32; block ids inside the token's sequence, < 0 = unused slot
    cu_seqlens_q: Tensor  # [batch + 1], int32
    cu_seqlens_k: Tensor  # [batch + 1], int32
    block_size: int  # keys per selected block
    softmax_scale: float  # never None: the default is resolved
    causal: bool

    @property
    def total_q(self) -> int:
        """Query tokens of all sequences."""
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        """Elements of one head of q, k and v."""
        return self.q.shape[2]

    @property
    def total_k(self) -> int:
        """Keys of all sequences."""
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.k.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head, and its selection."""
        return self.num_heads // self.num_kv_heads

    @property
    def topk(self) -> int:
        """Slots per (KV head, query token)."""
        return self.topk_idx.shape[2]

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def num_blocks(self) -> int:
        """Upper bound on the KV blocks of all sequences, known without reading cu_seqlens.

        Sequence b owns the global ids from `start_k(b) // block_size + b` on.
        """
        return self.total_k // self.block_size + self.batch


@dataclass(frozen=True)
class Chunk:
    """KV heads [head_begin, head_end) times query tokens [query_begin, query_end): what one round of stages does.

    Buffers of a chunk (the plan, partials, pieces) and the `dk`, `dv` that the backward stages get count heads from
    `head_begin`: `dk` is [total_k, num_heads of the chunk, head_dim], possibly a strided view. Whole-problem tensors
    (q, k, v, topk_idx, out, lse, delta, dout, dq) are indexed with absolute heads and tokens.
    """

    head_begin: int
    head_end: int
    query_begin: int
    query_end: int

    @property
    def num_heads(self) -> int:
        """KV heads of the chunk."""
        return self.head_end - self.head_begin

    @property
    def num_queries(self) -> int:
        """Query tokens of the chunk."""
        return self.query_end - self.query_begin


@dataclass(frozen=True)
class ChunkGrid:
    """Chunks that are split and planned together: all of one size, but for the last heads and the last queries."""

    head_begin: int
    head_end: int
    query_begin: int
    query_end: int
    chunk_heads: int
    chunk_queries: int

    @functools.cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks, heads outside, queries inside; the first is the largest."""
        return tuple(
            Chunk(
                head,
                min(head + self.chunk_heads, self.head_end),
                query,
                min(query + self.chunk_queries, self.query_end),
            )
            for head in range(self.head_begin, self.head_end, self.chunk_heads)
            for query in range(self.query_begin, self.query_end, self.chunk_queries)
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """The chunk's selection, inverted: which edges (query, slot) each cell (KV head, query range, KV block) serves.

    edge = (query - query_begin) * topk + slot, inside one head. Range r of R has the queries that start
    r * ceil(num_queries / R) after query_begin; cell = ((head - head_begin) * R + range) * num_blocks + global block.
    Work items name their head and block as (head - head_begin) * num_blocks + global block, whatever the range.
    """

    csr_offsets: Tensor  # [num_heads * R * num_blocks + 1], int32, exclusive prefix sum of edges per cell
    csr_edges: Tensor  # [num_heads * num_queries * topk], int32, sorted by cell, then ascending; tail unwritten
    work_items: Tensor  # [max_items, 4], int32: (head and block, edge_begin, edge_end, sequence); -1 behind the last
    next_item: Tensor  # [1], int32, zero: a main stage that fetches its items as it goes counts them here, once a plan
    edges_per_item: int  # the last item of a cell has fewer, or up to min_rest - 1 more
