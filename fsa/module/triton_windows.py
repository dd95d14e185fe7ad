"""What the Triton kernels of the compressed branch share: who sees which window, sizes, loads.

A window is a row of compressed_k and compressed_v, counted over all sequences. Query i of a sequence sees window w of
it iff i >= w * kernel_stride + kernel_size - 1. So a query sees an interval of windows, and a window is seen by an
interval of queries, which ends where its sequence ends. A tile of rows may reach over several sequences: every row has
its own interval, and tiles inside all of them need no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_ref.common import INFINITY, LOG2_E, load_rows, padded_dim, sequence_bounds, sequence_of_query

# Sizes that change from call to call: Triton would compile a kernel anew for multiples of 16, and for 1.
SIZES = (
    "batch",
    "total",
    "max_windows",
    "num_heads",
    "num_kv_heads",
    "num_tiles",
    "num_splits",
    "chunk_begin",
    "chunk_end",
    "topk",
    "init_blocks",
    "local_blocks",
)


@triton.jit
def seen_windows(
    query,
    cu_seqlens,
    compressed_cu_seqlens,
    batch,
    total,
    max_windows,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
):
    """The windows [begin, end) that each query token sees; begin is its sequence's first window, seen or not."""
    sequence = sequence_of_query(query, cu_seqlens, batch)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens, total)
    begin, num_windows = sequence_bounds(sequence, compressed_cu_seqlens, max_windows)
    position = query - q_begin
    complete = (tl.maximum(position, KERNEL_SIZE - 1) - (KERNEL_SIZE - 1)) // KERNEL_STRIDE + 1
    sees = (position >= KERNEL_SIZE - 1) & (position < q_len)
    return begin, begin + tl.where(sees, tl.minimum(complete, num_windows), 0)


@triton.jit
def seeing_queries(
    window,
    cu_seqlens,
    compressed_cu_seqlens,
    batch,
    total,
    max_windows,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
):
    """The query tokens [begin, end) that see each window; end is the end of its sequence."""
    sequence = sequence_of_query(window, compressed_cu_seqlens, batch)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens, total)
    first_window, num_windows = sequence_bounds(sequence, compressed_cu_seqlens, max_windows)
    index = window - first_window
    end = q_begin + tl.where((index >= 0) & (index < num_windows), q_len, 0)
    return tl.minimum(q_begin + index * KERNEL_STRIDE + KERNEL_SIZE - 1, end), end


@triton.jit
def load_seen_rows(
    base, row_offsets, row_mask, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """`load_rows`, without the masks where all rows exist and where head_dim needs no padding: they cost time."""
    if MASK_ROWS:
        return load_rows(base, row_offsets, row_mask, HEAD_DIM, PADDED_DIM)
    dims = tl.arange(0, PADDED_DIM)
    if HEAD_DIM == PADDED_DIM:
        return tl.load(base + row_offsets[:, None] + dims[None, :])
    return tl.load(base + row_offsets[:, None] + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def load_normaliser(lse, head, query, exists, total):
    """lse of a head's query tokens in log2; +inf, so that nothing weighs anything, for those that see no window."""
    lse_log2 = tl.load(lse + head.to(tl.int64) * total + query, mask=exists, other=-INFINITY) * LOG2_E
    return tl.where(lse_log2 == -INFINITY, INFINITY, lse_log2)


def uses_wgmma(device: torch.device) -> bool:
    """Whether products take their operands from shared memory, so that tiles fill fewer registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose_tiles(tables: dict[str, dict[int, dict[str, int]]], q: torch.Tensor) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of a kernel for q [total, num_heads, head_dim].

    Args:
        tables: by "wgmma", "mma" and "fp32" (plain arithmetic), then by the largest padded head_dim.
    """
    kind = "fp32" if q.dtype == torch.float32 else "wgmma" if uses_wgmma(q.device) else "mma"
    padded = padded_dim(q.shape[2])
    return next(tiles for largest, tiles in tables[kind].items() if padded <= largest)
