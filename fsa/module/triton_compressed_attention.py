"""Compressed attention in Triton, forward: flash attention over the few windows of a sequence, under a stair.

A program owns a tile of query tokens of one head, and walks the windows that they see. The tiles below the stair need
no mask; the last ones, which the stair crosses, do. The source of the online softmax is FlashAttention
(arXiv 2205.14135).
`triton_compressed_attention_backward` has the gradients, `triton_windows` says who sees which window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.module.triton_compressed_attention_backward import backward
from fsa.module.triton_windows import SIZES, choose_tiles, load_seen_rows, seen_windows
from triton_ref.common import (
    INFINITY,
    LN_2,
    LOG2_E,
    exp2_difference,
    is_finite,
    load_rows,
    matmul,
    padded_dim,
    store_rows,
)
from triton_ref.forward_main import sees_any

__all__ = ["backward", "forward"]

# TILE_K: windows of a tile below the stair; STAIR_K: of a tile that is masked. No spills in the loops (cuobjdump).
FORWARD_TILES = {
    "wgmma": {
        64: {"TILE_Q": 128, "TILE_K": 128, "STAIR_K": 64, "num_warps": 8, "num_stages": 2},
        128: {"TILE_Q": 128, "TILE_K": 128, "STAIR_K": 32, "num_warps": 8, "num_stages": 2},
        256: {"TILE_Q": 128, "TILE_K": 64, "STAIR_K": 32, "num_warps": 8, "num_stages": 2},
    },
    "mma": {
        128: {"TILE_Q": 128, "TILE_K": 32, "STAIR_K": 32, "num_warps": 8, "num_stages": 2},
        256: {"TILE_Q": 64, "TILE_K": 32, "STAIR_K": 32, "num_warps": 8, "num_stages": 2},
    },
    "fp32": {
        64: {"TILE_Q": 32, "TILE_K": 32, "STAIR_K": 32, "num_warps": 8, "num_stages": 1},
        256: {"TILE_Q": 16, "TILE_K": 16, "STAIR_K": 16, "num_warps": 8, "num_stages": 1},
    },
}
NONFINITE_DIMS = tl.constexpr(16)  # columns of V that are searched at a time for NaN and infinities


@triton.jit
def add_windows(
    acc,
    row_max,
    row_sum,
    q_tile,
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
    """One step of the online softmax: a tile of windows. Returns its state, and whether V had NaN or infinities.

    Masked tiles leave those out of the product, for 0 times NaN is NaN.
    """
    offsets = window.to(tl.int64)
    k_tile = load_seen_rows(k, offsets * k_window_stride, window < last, MASKED, HEAD_DIM, PADDED_DIM)
    v_tile = load_seen_rows(v, offsets * v_window_stride, window < last, MASKED, HEAD_DIM, PADDED_DIM)
    scores = matmul(q_tile, tl.trans(k_tile))
    nonfinite = False
    if MASKED:
        scores = tl.where((window[None, :] >= begin[:, None]) & (window[None, :] < end[:, None]), scores, -INFINITY)
        finite = is_finite(v_tile)
        nonfinite = tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0
        v_tile = tl.where(finite, v_tile, 0.0)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * softmax_scale_log2)
    probs = exp2_difference(scores * softmax_scale_log2, new_max[:, None])
    decay = exp2_difference(row_max, new_max)
    row_sum = row_sum * decay + tl.sum(probs, 1)
    acc = tl.dot(probs.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, row_sum, nonfinite


@triton.jit
def return_nonfinite(
    out,
    out_offsets,
    exists,
    v,
    dims,
    begin,
    end,
    first,
    last,
    v_window_stride,
    STAIR_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Rare: give NaN and infinities of some columns of V back to the rows that see them, and to them alone."""
    places = out + out_offsets[:, None] + dims[None, :]
    mask = exists[:, None] & (dims[None, :] < HEAD_DIM)
    output = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    for window in range(first, last, STAIR_K):
        row = window + tl.arange(0, STAIR_K)
        v_places = v + row.to(tl.int64)[:, None] * v_window_stride + dims[None, :]
        v_tile = tl.load(v_places, mask=(row < last)[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
        nonfinite = is_finite(v_tile) == 0
        visible = (row[None, :] >= begin[:, None]) & (row[None, :] < end[:, None])
        output += tl.where(sees_any(visible, nonfinite & (v_tile != -INFINITY)), INFINITY, 0.0)
        output += tl.where(sees_any(visible, nonfinite & (v_tile != INFINITY)), -INFINITY, 0.0)  # inf - inf: NaN
    tl.store(places, output.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q,  # [total, num_heads, head_dim]
    k,  # [max_windows, num_kv_heads, head_dim]
    v,  # [max_windows, num_kv_heads, head_dim]
    cu_seqlens,  # [batch + 1]
    compressed_cu_seqlens,  # [batch + 1]
    out,  # [total, num_heads, head_dim], contiguous
    lse,  # [num_heads, total], natural log
    q_token_stride,
    q_head_stride,
    k_window_stride,
    k_head_stride,
    v_window_stride,
    v_head_stride,
    batch,
    total,
    max_windows,
    num_heads,
    num_tiles,
    softmax_scale_log2,
    GROUP_SIZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STAIR_K: tl.constexpr,
):
    # The last tiles of a sequence see the most windows: they go first.
    tile = num_tiles - 1 - tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    k += head // GROUP_SIZE * k_head_stride
    v += head // GROUP_SIZE * v_head_stride

    query = tile * TILE_Q + tl.arange(0, TILE_Q)
    exists = query < total
    query = tl.minimum(query, total - 1)
    begin, end = seen_windows(
        query, cu_seqlens, compressed_cu_seqlens, batch, total, max_windows, KERNEL_SIZE, KERNEL_STRIDE
    )
    first, last = tl.min(begin, 0), tl.max(end, 0)
    unmasked = tl.where(tl.max(begin, 0) == first, (tl.min(end, 0) - first) // TILE_K * TILE_K, 0)
    q_offsets = query.to(tl.int64) * q_token_stride + head * q_head_stride
    q_tile = load_rows(q, q_offsets, exists, HEAD_DIM, PADDED_DIM)

    acc = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    row_max = tl.full([TILE_Q], -INFINITY, tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    for window in range(first, first + unmasked, TILE_K):
        acc, row_max, row_sum, _ = add_windows(
            acc, row_max, row_sum, q_tile, k, v, window + tl.arange(0, TILE_K), begin, end, last,
            k_window_stride, v_window_stride, softmax_scale_log2, False, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    has_nonfinite = False
    for window in range(first + unmasked, last, STAIR_K):
        acc, row_max, row_sum, nonfinite = add_windows(
            acc, row_max, row_sum, q_tile, k, v, window + tl.arange(0, STAIR_K), begin, end, last,
            k_window_stride, v_window_stride, softmax_scale_log2, True, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
        has_nonfinite = has_nonfinite | nonfinite

    out_offsets = (query.to(tl.int64) * num_heads + head) * HEAD_DIM
    output = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    store_rows(out, out_offsets, output, exists, HEAD_DIM, PADDED_DIM)
    tl.store(lse + head * total + query, (row_max + tl.log2(row_sum)) * LN_2, mask=exists)

    if has_nonfinite:
        tl.debug_barrier()  # the rows stored above are read here by other threads
        for dim in range(0, PADDED_DIM, NONFINITE_DIMS):
            return_nonfinite(
                out, out_offsets, exists, v, dim + tl.arange(0, NONFINITE_DIMS), begin, end, first + unmasked, last,
                v_window_stride, STAIR_K, HEAD_DIM,
            )  # fmt: skip


def forward(
    q: torch.Tensor,
    compressed_k: torch.Tensor,
    compressed_v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compressed_cu_seqlens: torch.Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query token to the windows that it sees.

    Args:
        q: [total, num_heads, head_dim], fp16, bf16 or fp32; head_dim a multiple of 8 up to 256. It and the next two
            are as `fsa.pipeline.as_kernel_input` leaves them.
        compressed_k, compressed_v: [max_windows, num_kv_heads, head_dim], dtype of q; rows from
            compressed_cu_seqlens[-1] on are never read.
        cu_seqlens, compressed_cu_seqlens: [batch + 1], int32, contiguous.
        kernel_size, kernel_stride: tokens a window, and from one window to the next.
        softmax_scale: positive factor of the scores.

    Returns:
        out: [total, num_heads, head_dim], dtype of q; 0 for a query that sees no window.
        lse: [num_heads, total], fp32, natural log; -inf for a query that sees no window.
    """
    total, num_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, total), dtype=torch.float32)
    if total == 0:
        return out, lse
    tiles = choose_tiles(FORWARD_TILES, q)
    num_tiles = triton.cdiv(total, tiles["TILE_Q"])
    with torch.cuda.device_of(q):
        forward_kernel[(num_tiles * num_heads,)](
            q,
            compressed_k,
            compressed_v,
            cu_seqlens,
            compressed_cu_seqlens,
            out,
            lse,
            *q.stride()[:2],
            *compressed_k.stride()[:2],
            *compressed_v.stride()[:2],
            batch=cu_seqlens.shape[0] - 1,
            total=total,
            max_windows=compressed_k.shape[0],
            num_heads=num_heads,
            num_tiles=num_tiles,
            softmax_scale_log2=softmax_scale * LOG2_E.value,
            GROUP_SIZE=num_heads // compressed_k.shape[1],
            KERNEL_SIZE=kernel_size,
            KERNEL_STRIDE=kernel_stride,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim(head_dim),
            **tiles,
        )
    return out, lse
