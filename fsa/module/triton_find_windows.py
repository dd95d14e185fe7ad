"""Where the windows of packed sequences lie, in Triton: two launches, since counts of whole sequences come first.

sum_windows     chunks and windows of every sequence, as prefix sums; one program
find_rows       what stands in every row of `Windows`, each found by bisection in the sums
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_ref.common import sequence_bounds, sequence_of_query

# Sizes that change from call to call: Triton would compile a kernel anew for multiples of 16, and for 1.
SIZES = ("batch", "total", "n")
TILE_SEQUENCES = 1024
TILE_ROWS = 256


@triton.jit(do_not_specialize=SIZES)
def sum_windows_kernel(
    cu_seqlens,  # [batch + 1]
    window_bounds,  # [batch + 1], int32
    chunk_bounds,  # [batch + 1], int32
    batch,
    total,
    n,
    KERNEL_STRIDE: tl.constexpr,
    PLACES: tl.constexpr,
    TILE_SEQUENCES: tl.constexpr,
):
    tl.store(window_bounds, 0)
    tl.store(chunk_bounds, 0)
    windows_before = tl.full([], 0, tl.int64)
    chunks_before = tl.full([], 0, tl.int64)
    for first in range(0, batch, TILE_SEQUENCES):
        sequence = first + tl.arange(0, TILE_SEQUENCES)
        exists = sequence < batch
        _, length = sequence_bounds(tl.minimum(sequence, batch - 1), cu_seqlens, total)
        # 64 bits: sequences of a wrong cu_seqlens may overlap.
        chunks = tl.where(exists, length // KERNEL_STRIDE, 0).to(tl.int64)
        windows = tl.maximum(chunks - (PLACES - 1), 0)
        window_ends = tl.minimum(windows_before + tl.cumsum(windows, 0), n)
        chunk_ends = tl.minimum(chunks_before + tl.cumsum(chunks, 0), n)
        tl.store(window_bounds + 1 + sequence, window_ends.to(tl.int32), mask=exists)
        tl.store(chunk_bounds + 1 + sequence, chunk_ends.to(tl.int32), mask=exists)
        windows_before = tl.max(window_ends, 0)
        chunks_before = tl.max(chunk_ends, 0)


@triton.jit
def row_of_sequence(row, cu_seqlens, batch, total):
    """Sequence of each row of a packed tensor, and where in it the row stands; -1 in no sequence."""
    sequence = sequence_of_query(row, cu_seqlens, batch)
    begin, length = sequence_bounds(sequence, cu_seqlens, total)
    position = row - begin
    return sequence, tl.where((position >= 0) & (position < length), position, -1)


@triton.jit(do_not_specialize=SIZES)
def find_rows_kernel(
    cu_seqlens,  # [batch + 1]
    window_bounds,  # [batch + 1]
    chunk_bounds,  # [batch + 1]
    positions,  # [total + n], int64
    terms,  # [PLACES, n], int64
    chunk_tokens,  # [n * KERNEL_STRIDE], int64
    token_places,  # [total], int64
    in_chunk,  # [total], bool
    batch,
    total,
    n,
    KERNEL_STRIDE: tl.constexpr,
    PLACES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)

    exists = row < total  # as a token
    sequence, position = row_of_sequence(row, cu_seqlens, batch, total)
    _, length = sequence_bounds(sequence, cu_seqlens, total)
    place = tl.load(chunk_bounds + sequence) * KERNEL_STRIDE + position
    place = tl.minimum(tl.maximum(place, 0), tl.maximum(n * KERNEL_STRIDE - 1, 0))
    tl.store(positions + row, position, mask=exists)
    tl.store(token_places + row, place, mask=exists)
    tl.store(in_chunk + row, (position >= 0) & (position < length // KERNEL_STRIDE * KERNEL_STRIDE), mask=exists)

    exists = row < n * KERNEL_STRIDE  # as a token of a chunk
    sequence, position = row_of_sequence(row // KERNEL_STRIDE, chunk_bounds, batch, n)
    begin, _ = sequence_bounds(sequence, cu_seqlens, total)
    chunk_begin = tl.minimum(tl.maximum(begin + position * KERNEL_STRIDE, 0), tl.maximum(total - KERNEL_STRIDE, 0))
    tl.store(chunk_tokens + row, chunk_begin + row % KERNEL_STRIDE, mask=exists)

    exists = row < n  # as a window
    sequence, position = row_of_sequence(row, window_bounds, batch, n)
    first_chunk = tl.load(chunk_bounds + sequence) + position
    tl.store(positions + total + row, tl.maximum(position, 0) * KERNEL_STRIDE, mask=exists)
    for place in range(PLACES):
        chunk = tl.minimum(tl.maximum(first_chunk + place, 0), tl.maximum(n - 1, 0)).to(tl.int64)
        tl.store(terms + tl.cast(n, tl.int64) * place + row, chunk * PLACES + place, mask=exists)


def find_windows(
    cu_seqlens: torch.Tensor, total: int, kernel_size: int, kernel_stride: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of `fsa.module.compression.Windows`.

    Args:
        cu_seqlens: [batch + 1], int32, contiguous, batch >= 1; may hold anything.
        total: tokens of all sequences.
        kernel_size, kernel_stride: tokens a window, and from one window to the next; whole strides.
    """
    batch, n, places = cu_seqlens.shape[0] - 1, total // kernel_stride, kernel_size // kernel_stride
    window_bounds, chunk_bounds = torch.empty_like(cu_seqlens), torch.empty_like(cu_seqlens)
    shapes = ((total + n,), (places, n), (n * kernel_stride,), (total,))
    rows = [cu_seqlens.new_empty(shape, dtype=torch.int64) for shape in shapes]
    rows.append(cu_seqlens.new_empty((total,), dtype=torch.bool))
    sizes = {"batch": batch, "total": total, "n": n, "KERNEL_STRIDE": kernel_stride, "PLACES": places}
    with torch.cuda.device_of(cu_seqlens):
        sum_windows_kernel[(1,)](cu_seqlens, window_bounds, chunk_bounds, **sizes, TILE_SEQUENCES=TILE_SEQUENCES)
        if total > 0:
            grid = (triton.cdiv(total, TILE_ROWS),)
            find_rows_kernel[grid](cu_seqlens, window_bounds, chunk_bounds, *rows, **sizes, TILE_ROWS=TILE_ROWS)
    positions, terms, chunk_tokens, token_places, in_chunk = rows
    return window_bounds, positions, terms, chunk_tokens, token_places, in_chunk
