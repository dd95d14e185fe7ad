"""Compressed attention in Triton, stages dkv and reduce_dkv of the backward: dV = P^T dO, dK = softmax_scale dS^T Q."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.module.triton_windows import SIZES, seeing_queries
from triton_ref.common import INFINITY, LOG2_E, is_finite, load_rows, matmul, store_rows

# TILE_Q, TILE_K: queries and windows of a tile; STAIR_Q: queries of a tile that is masked.
DKV_TILES = {
    "wgmma": {
        128: {"TILE_Q": 64, "STAIR_Q": 32, "TILE_K": 128, "num_warps": 8, "num_stages": 3},
        256: {"TILE_Q": 32, "STAIR_Q": 16, "TILE_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "mma": {
        128: {"TILE_Q": 64, "STAIR_Q": 16, "TILE_K": 64, "num_warps": 8, "num_stages": 2},
        256: {"TILE_Q": 32, "STAIR_Q": 16, "TILE_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "fp32": {
        64: {"TILE_Q": 32, "STAIR_Q": 32, "TILE_K": 32, "num_warps": 8, "num_stages": 1},
        256: {"TILE_Q": 16, "STAIR_Q": 16, "TILE_K": 16, "num_warps": 8, "num_stages": 1},
    },
}

DKV_PROGRAMS = 1024  # wanted: eight for each SM, for the tiles of windows differ in how many queries see them
DKV_PARTS_BYTES = 128 * 2**20  # of dK and dV in parts at most, beyond one split
REDUCE_ROWS = 16  # windows of a tile of the reduce


@triton.jit
def load_by_row(lse, delta, row, exists):
    """lse in log2, +inf for who sees nothing, and delta.

    The sums over one element keep the compiler from loading in the layout of the columns of a product, in which every
    thread has sixteen of them.
    """
    one = row[:, None] + tl.arange(0, 1)[None, :]
    lse_log2 = tl.sum(tl.load(lse + one, mask=exists[:, None], other=-INFINITY), 1) * LOG2_E
    row_delta = tl.sum(tl.load(delta + one, mask=exists[:, None], other=0.0), 1)
    return tl.where(lse_log2 == -INFINITY, INFINITY, lse_log2), row_delta


@triton.jit
def add_to_dkv(
    dk_tile,
    dv_tile,
    k_tile,
    v_tile,
    q,
    dout,
    lse,
    delta,
    head,
    query,
    begin,
    end,
    last,
    total,
    q_token_stride,
    q_head_stride,
    dout_token_stride,
    dout_head_stride,
    softmax_scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """dK and dV of a tile of windows from a tile of queries of one head; S and P are transposed, [windows, queries].

    Queries from `last` on are zero and weigh nothing. Masked tiles multiply no NaN of Q (who sees one has it in dS
    already) nor of dO, which reaches all of dV of the windows that its query sees.
    """
    exists = query < last
    token = query.to(tl.int64)
    q_tile = load_rows(q, token * q_token_stride + head * q_head_stride, exists, HEAD_DIM, PADDED_DIM)
    dout_tile = load_rows(dout, token * dout_token_stride + head * dout_head_stride, exists, HEAD_DIM, PADDED_DIM)
    lse_log2, row_delta = load_by_row(lse, delta, head * total + query, exists)
    probs = tl.exp2(matmul(k_tile, tl.trans(q_tile)) * softmax_scale_log2 - lse_log2[None, :])
    dscores = probs * (matmul(v_tile, tl.trans(dout_tile)) - row_delta[None, :])
    if MASKED:
        visible = (query[None, :] >= begin[:, None]) & (query[None, :] < end[:, None])
        finite = is_finite(dout_tile)
        tainted = tl.where(tl.min(finite.to(tl.int32), 1) == 0, float("nan"), 0.0)
        probs = tl.where(visible, probs + tainted[None, :], 0.0)
        dscores = tl.where(visible, dscores, 0.0)
        dout_tile = tl.where(finite, dout_tile, 0.0)
        q_tile = tl.where(is_finite(q_tile), q_tile, 0.0)
    dv_tile = tl.dot(probs.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
    dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    q,  # [total, num_heads, head_dim]
    k,  # [max_windows, num_kv_heads, head_dim]
    v,  # [max_windows, num_kv_heads, head_dim]
    dout,  # [total, num_heads, head_dim]
    lse,  # [num_heads, total], natural log
    delta,  # [num_heads, total]
    cu_seqlens,  # [batch + 1]
    compressed_cu_seqlens,  # [batch + 1]
    parts,  # [2 (dK, dV), num_splits, max_windows, num_kv_heads, head_dim], fp32
    q_token_stride,
    q_head_stride,
    k_window_stride,
    k_head_stride,
    v_window_stride,
    v_head_stride,
    dout_token_stride,
    dout_head_stride,
    batch,
    total,
    max_windows,
    num_kv_heads,
    num_splits,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    STAIR_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    # The first windows of a sequence are seen by the most queries: they go first.
    split = tl.program_id(0) % num_splits
    kv_head = (tl.program_id(0) // num_splits % num_kv_heads).to(tl.int64)
    window = tl.program_id(0) // num_splits // num_kv_heads * TILE_K + tl.arange(0, TILE_K)
    num_windows = tl.minimum(tl.load(compressed_cu_seqlens + batch), max_windows)
    exists = window < num_windows
    if tl.min(window, 0) >= num_windows:
        return
    softmax_scale_log2 = softmax_scale * LOG2_E

    begin, end = seeing_queries(
        tl.minimum(window, num_windows - 1),
        cu_seqlens,
        compressed_cu_seqlens,
        batch,
        total,
        max_windows,
        KERNEL_SIZE,
        KERNEL_STRIDE,
    )
    first, last = tl.min(begin, 0), tl.max(end, 0)
    offsets = window.to(tl.int64)
    k_tile = load_rows(k, offsets * k_window_stride + kv_head * k_head_stride, exists, HEAD_DIM, PADDED_DIM)
    v_tile = load_rows(v, offsets * v_window_stride + kv_head * v_head_stride, exists, HEAD_DIM, PADDED_DIM)

    # Work: (head of the group, tile of queries), first those under the stair or of several sequences, which are masked.
    stair = tl.where(tl.min(end, 0) == last, tl.minimum(tl.max(begin, 0), last), last) - first
    stair_tiles = (stair + STAIR_Q - 1) // STAIR_Q
    first_full = first + stair_tiles * STAIR_Q
    full_tiles = (tl.maximum(last - first_full, 0) + TILE_Q - 1) // TILE_Q
    num_stair = GROUP_SIZE * stair_tiles
    num_work = (num_stair + GROUP_SIZE * full_tiles).to(tl.int64)
    work_begin = (num_work * split // num_splits).to(tl.int32)
    work_end = (num_work * (split + 1) // num_splits).to(tl.int32)

    dk_tile = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv_tile = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    first_head = kv_head * GROUP_SIZE
    for work in range(work_begin, tl.minimum(work_end, num_stair)):
        query = first + work % stair_tiles * STAIR_Q + tl.arange(0, STAIR_Q)
        dk_tile, dv_tile = add_to_dkv(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, first_head + work // stair_tiles, query,
            begin, end, last, total, q_token_stride, q_head_stride, dout_token_stride, dout_head_stride,
            softmax_scale_log2, True, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    for work in range(tl.maximum(work_begin - num_stair, 0), work_end - num_stair):
        query = first_full + work % full_tiles * TILE_Q + tl.arange(0, TILE_Q)
        dk_tile, dv_tile = add_to_dkv(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, first_head + work // full_tiles, query,
            begin, end, last, total, q_token_stride, q_head_stride, dout_token_stride, dout_head_stride,
            softmax_scale_log2, False, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip

    rows = ((split.to(tl.int64) * max_windows + offsets) * num_kv_heads + kv_head) * HEAD_DIM
    size = num_splits.to(tl.int64) * max_windows * num_kv_heads * HEAD_DIM  # of all parts of dK
    store_rows(parts, rows, dk_tile * softmax_scale, exists, HEAD_DIM, PADDED_DIM)
    store_rows(parts + size, rows, dv_tile, exists, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=SIZES)
def reduce_dkv_kernel(
    parts,  # [2, num_splits, max_windows, num_kv_heads, head_dim], fp32
    compressed_cu_seqlens,  # [batch + 1]
    dk,  # [max_windows, num_kv_heads, head_dim], contiguous
    dv,  # [max_windows, num_kv_heads, head_dim], contiguous
    batch,
    max_windows,
    num_kv_heads,
    num_splits,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # (window, KV head)
    which = tl.program_id(1).to(tl.int64)  # 0: dK, 1: dV
    num_rows = max_windows.to(tl.int64) * num_kv_heads
    written = row < tl.minimum(tl.load(compressed_cu_seqlens + batch), max_windows).to(tl.int64) * num_kv_heads
    tile = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    for split in range(num_splits):
        tile += load_rows(
            parts, ((which * num_splits + split) * num_rows + row) * HEAD_DIM, written, HEAD_DIM, PADDED_DIM
        )
    if which == 0:
        store_rows(dk, row * HEAD_DIM, tile, row < num_rows, HEAD_DIM, PADDED_DIM)
    else:
        store_rows(dv, row * HEAD_DIM, tile, row < num_rows, HEAD_DIM, PADDED_DIM)


def number_of_splits(compressed_k: torch.Tensor, total: int, group_size: int, tile_q: int, tile_k: int) -> int:
    """Into how many the queries of a tile of windows are cut: enough programs, little memory, enough work each."""
    max_windows, num_kv_heads, head_dim = compressed_k.shape
    wanted = triton.cdiv(DKV_PROGRAMS, triton.cdiv(max_windows, tile_k) * num_kv_heads)
    affordable = DKV_PARTS_BYTES // (2 * 4 * max_windows * num_kv_heads * head_dim)
    worthwhile = group_size * total // (4 * tile_q)
    return max(1, min(wanted, affordable, worthwhile))
