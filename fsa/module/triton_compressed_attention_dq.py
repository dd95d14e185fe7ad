"""Compressed attention in Triton, stage dq of the backward: dS = P * (dP - delta), dQ = softmax_scale dS K."""

from __future__ import annotations

import triton
import triton.language as tl

from fsa.module.triton_windows import (
    SIZES,
    load_normaliser,
    load_seen_rows,
    seen_windows,
)
from triton_ref.common import LOG2_E, is_finite, load_rows, matmul, store_rows

# TILE_Q, TILE_K: queries and windows of a tile.
DQ_TILES = {
    "wgmma": {
        128: {"TILE_Q": 128, "TILE_K": 64, "num_warps": 8, "num_stages": 3},
        256: {"TILE_Q": 64, "TILE_K": 32, "num_warps": 8, "num_stages": 2},
    },
    "mma": {
        128: {"TILE_Q": 64, "TILE_K": 64, "num_warps": 8, "num_stages": 2},
        256: {"TILE_Q": 64, "TILE_K": 32, "num_warps": 8, "num_stages": 2},
    },
    "fp32": {
        64: {"TILE_Q": 32, "TILE_K": 32, "num_warps": 8, "num_stages": 1},
        256: {"TILE_Q": 16, "TILE_K": 16, "num_warps": 8, "num_stages": 1},
    },
}


@triton.jit
def add_to_dq(
    dq_tile,
    q_tile,
    dout_tile,
    lse_log2,
    delta,
    k,
    v,
    window,
    begin,
    end,
    last,
    k_window_stride,
    v_window_stride,
    softmax_scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """dQ from a tile of windows. Masked tiles multiply no NaN of K: who sees one has it in dS already."""
    offsets = window.to(tl.int64)
    k_tile = load_seen_rows(k, offsets * k_window_stride, window < last, MASKED, HEAD_DIM, PADDED_DIM)
    v_tile = load_seen_rows(v, offsets * v_window_stride, window < last, MASKED, HEAD_DIM, PADDED_DIM)
    scores = matmul(q_tile, tl.trans(k_tile))
    dprobs = matmul(dout_tile, tl.trans(v_tile))
    dscores = tl.exp2(scores * softmax_scale_log2 - lse_log2[:, None]) * (dprobs - delta[:, None])
    if MASKED:
        dscores = tl.where((window[None, :] >= begin[:, None]) & (window[None, :] < end[:, None]), dscores, 0.0)
        k_tile = tl.where(is_finite(k_tile), k_tile, 0.0)
    return tl.dot(dscores.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q,  # [total, num_heads, head_dim]
    k,  # [max_windows, num_kv_heads, head_dim]
    v,  # [max_windows, num_kv_heads, head_dim]
    dout,  # [total, num_heads, head_dim]
    lse,  # [num_heads, total], natural log
    delta,  # [num_heads, total]
    cu_seqlens,  # [batch + 1]
    compressed_cu_seqlens,  # [batch + 1]
    dq,  # [total, num_heads, head_dim], contiguous
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
    num_heads,
    num_tiles,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    # The last tiles of a sequence see the most windows: they go first.
    tile = num_tiles - 1 - tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    k += head // GROUP_SIZE * k_head_stride
    v += head // GROUP_SIZE * v_head_stride
    softmax_scale_log2 = softmax_scale * LOG2_E

    query = tile * TILE_Q + tl.arange(0, TILE_Q)
    exists = query < total
    query = tl.minimum(query, total - 1)
    begin, end = seen_windows(
        query, cu_seqlens, compressed_cu_seqlens, batch, total, max_windows, KERNEL_SIZE, KERNEL_STRIDE
    )
    first, last = tl.min(begin, 0), tl.max(end, 0)
    unmasked = tl.where(tl.max(begin, 0) == first, (tl.min(end, 0) - first) // TILE_K * TILE_K, 0)
    token = query.to(tl.int64)
    q_tile = load_rows(q, token * q_token_stride + head * q_head_stride, exists, HEAD_DIM, PADDED_DIM)
    dout_tile = load_rows(dout, token * dout_token_stride + head * dout_head_stride, exists, HEAD_DIM, PADDED_DIM)
    lse_log2 = load_normaliser(lse, head, query, exists, total)
    row_delta = tl.load(delta + head * total + query, mask=exists, other=0.0)

    dq_tile = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    windows = tl.arange(0, TILE_K)
    for window in range(first, first + unmasked, TILE_K):
        dq_tile = add_to_dq(
            dq_tile, q_tile, dout_tile, lse_log2, row_delta, k, v, window + windows, begin, end, last,
            k_window_stride, v_window_stride, softmax_scale_log2, False, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    for window in range(first + unmasked, last, TILE_K):
        dq_tile = add_to_dq(
            dq_tile, q_tile, dout_tile, lse_log2, row_delta, k, v, window + windows, begin, end, last,
            k_window_stride, v_window_stride, softmax_scale_log2, True, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    store_rows(dq, (token * num_heads + head) * HEAD_DIM, dq_tile * softmax_scale, exists, HEAD_DIM, PADDED_DIM)
