"""What the stages share: sequences and visibility, the rows of a work item, softmax arithmetic, tiles of rows.

Keys are counted from the start of their own sequence. Who sees what is decided here and nowhere else:
`last_visible_key` says how far a query sees, `slot_attends` whether a selected block (or a sub-block of it) has a key
that it sees.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))

# Sizes that change from call to call: Triton would compile a kernel anew for multiples of 16, and for 1.
SIZES = (
    "batch",
    "total_q",
    "total_k",
    "topk",
    "num_blocks",
    "num_cells",
    "num_ranges",
    "range_queries",
    "num_heads",
    "num_kv_heads",
    "head_begin",
    "query_begin",
    "query_end",
    "edges_per_head",
    "edges_per_item",
    "min_rest",
)


# Sequences. cu_seqlens may hold anything: bounds are clamped where they are read, so no value leads out of a tensor.


@triton.jit
def sequence_of_query(query, cu_seqlens_q, batch):
    """Sequence of each query token: the largest b with cu_seqlens_q[b] <= query, by bisection."""
    low = query * 0
    high = low + batch
    span = batch
    while span > 1:
        middle = (low + high) // 2
        narrow = high - low > 1
        starts_later = tl.load(cu_seqlens_q + middle) > query
        high = tl.where(narrow & starts_later, middle, high)
        low = tl.where(narrow & (starts_later == 0), middle, low)
        span = (span + 1) // 2
    return low


@triton.jit
def sequence_of_edge(edge, topk, query_begin, cu_seqlens_q, batch):
    """Sequence of the query token of an edge of a chunk."""
    return sequence_of_query(query_begin + edge // topk, cu_seqlens_q, batch)


@triton.jit
def sequence_bounds(sequence, cu_seqlens, total):
    """First token of a sequence and its length."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), 0), total)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def first_block(k_begin, sequence, BLOCK_SIZE: tl.constexpr):
    """Number that a sequence's block 0 has among the blocks of all sequences.

    A sequence of n keys owns ceil(n / BLOCK_SIZE) numbers, which never reach the next sequence's first: no scan is
    needed.
    """
    return k_begin // BLOCK_SIZE + sequence


@triton.jit
def last_visible_key(query, q_begin, q_len, k_len, CAUSAL: tl.constexpr):
    """Last key that a query token sees, -1 or less when it sees none. Causal attention is aligned bottom-right."""
    position = query - q_begin
    last = k_len - 1
    if CAUSAL:
        last = tl.minimum(last, position + (k_len - q_len))
    return tl.where((position >= 0) & (position < q_len), last, -1)


@triton.jit
def slot_attends(block_id, key_offset, last_key, BLOCK_SIZE: tl.constexpr):
    """Whether the keys of a selected block from `key_offset` on begin with one that the query sees.

    Any int32 may stand in topk_idx: negative ids are unused slots, ids past the sequence begin after its last key.
    """
    return (block_id >= 0) & (block_id.to(tl.int64) * BLOCK_SIZE + key_offset <= last_key)


# Rows of a work item


@triton.jit
def load_work_item(work_items, item):
    """(cell, edge_begin, edge_end, sequence); an unused item has cell < 0."""
    row = work_items + item.to(tl.int64) * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def work_item_rows(csr_edges, edge_begin, edge_end, row_begin, GROUP_SIZE: tl.constexpr, TILE_Q: tl.constexpr):
    """A tile of a work item's rows: (edge, head inside the group, whether the row exists).

    Row r is query head r % GROUP_SIZE of the token of edge r // GROUP_SIZE.
    """
    rows = row_begin + tl.arange(0, TILE_Q)
    index = edge_begin + rows // GROUP_SIZE
    exists = index < edge_end
    return tl.load(csr_edges + index, mask=exists, other=0), rows % GROUP_SIZE, exists


@triton.jit
def partial_rows(head, edges_per_head, edge, sub, group, SUBS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Row of a partial buffer [num_heads, num_queries, topk, SUBS, GROUP_SIZE]; an edge is query * topk + slot."""
    return ((head.to(tl.int64) * edges_per_head + edge) * SUBS + sub) * GROUP_SIZE + group


# Rows of a chunk


@triton.jit
def chunk_rows(
    tile,
    query_begin,
    query_end,
    cu_seqlens_q,
    cu_seqlens_k,
    batch,
    total_q,
    total_k,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """A tile of the rows (query, head of the group) of queries [query_begin, query_end).

    Returns (query, head inside the group, last key that the query sees, first_block of its sequence, whether the row
    exists).
    """
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    query = query_begin + rows // GROUP_SIZE
    exists = query < query_end
    query = tl.minimum(query, query_end - 1)
    sequence = sequence_of_query(query, cu_seqlens_q, batch)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens_q, total_q)
    k_begin, k_len = sequence_bounds(sequence, cu_seqlens_k, total_k)
    last_key = last_visible_key(query, q_begin, q_len, k_len, CAUSAL)
    return query, rows % GROUP_SIZE, last_key, first_block(k_begin, sequence, BLOCK_SIZE), exists


# Softmax arithmetic


@triton.jit
def exp2_difference(x, y):
    """2^(x - y) where a side without any key is -inf: it weighs nothing, and (-inf) - (-inf) never happens."""
    return tl.exp2(x - tl.where(y == -INFINITY, INFINITY, y))


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp32, exact; exponents from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """False for NaN and infinities."""
    return tl.abs(x.to(tl.float32)) < INFINITY


# Tiles of rows. PADDED_DIM is head_dim rounded up to a power of two; the padding is zero.


@triton.jit
def load_rows(base, row_offsets, row_mask, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Tile [rows, PADDED_DIM] of rows that start `row_offsets` elements after `base`; masked rows are zero."""
    dims = tl.arange(0, PADDED_DIM)
    return tl.load(
        base + row_offsets[:, None] + dims[None, :], mask=row_mask[:, None] & (dims[None, :] < HEAD_DIM), other=0.0
    )


@triton.jit
def store_rows(base, row_offsets, tile, row_mask, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Store a tile [rows, PADDED_DIM], without its padding, in the element type of `base`."""
    dims = tl.arange(0, PADDED_DIM)
    tl.store(
        base + row_offsets[:, None] + dims[None, :],
        tile.to(base.dtype.element_ty),
        mask=row_mask[:, None] & (dims[None, :] < HEAD_DIM),
    )


@triton.jit
def store_gradient_rows(
    base, row_offsets, tile, row_mask, ACCUMULATE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """Store rows of dK or dV; with ACCUMULATE, add to what earlier chunks of queries left there."""
    if ACCUMULATE:
        tile += load_rows(base, row_offsets, row_mask, HEAD_DIM, PADDED_DIM)
    store_rows(base, row_offsets, tile, row_mask, HEAD_DIM, PADDED_DIM)


@triton.jit
def matmul(a, b):
    """Product with fp32 accumulation, in the type of the inputs: fp32 is not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


def padded_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(head_dim))


def reduce_tile_rows(padded_dim: int) -> int:
    """Rows of a tile of the reduce stages, which keep one fp32 tile in registers."""
    return 2048 // padded_dim
