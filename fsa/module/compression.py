"""Compression of keys and values: windows of kernel_size tokens, one every kernel_stride, become one row each.

Native Sparse Attention (arXiv 2502.11089), equation 7. A window lies inside one sequence; a sequence of n tokens has
(n - kernel_size) // kernel_stride + 1 windows, or none if it is shorter than a window.

Windows overlap, so they are never written out. Tokens are gathered once, in chunks of kernel_stride; a window is
kernel_size / kernel_stride chunks in a row, and what each chunk contributes to each place in a window is added up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packed import packed_rows, prefix_sums


class Windows(NamedTuple):
    """Where the windows of packed sequences lie. n = total // kernel_stride bounds chunks and windows without a look at
    cu_seqlens; rows beyond the last window are padding."""

    cu_seqlens: Tensor  # [batch + 1], int32: windows of each sequence, prefix sums
    position: Tensor  # [n], int64: where a window's first token stands in its sequence; 0 in padding
    chunks: Tensor  # [kernel_size / kernel_stride, n], int64: rows of a window's chunks; those of padding: any
    chunk_tokens: Tensor  # [n * kernel_stride], int64: the tokens of every chunk; those of padding: any
    token_places: Tensor  # [total], int64: where a token stands in chunk_tokens; -1 in no chunk
    token_position: Tensor  # [total], int64: where a token stands in its sequence; -1 in none


def find_windows(cu_seqlens: Tensor, total: int, kernel_size: int, kernel_stride: int) -> Windows:
    """The windows of packed sequences of `total` tokens; cu_seqlens is [batch + 1], integers."""
    bounds = cu_seqlens.long().clamp(0, total)
    chunks = bounds.diff().clamp(min=0) // kernel_stride
    places = kernel_size // kernel_stride
    windows = (chunks - (places - 1)).clamp(min=0)
    n = total // kernel_stride
    chunk_bounds, window_bounds = (prefix_sums(lengths).clamp(max=n) for lengths in (chunks, windows))
    chunk, window, token = packed_rows(chunk_bounds, n), packed_rows(window_bounds, n), packed_rows(cu_seqlens, total)
    # Every operation is a launch on a GPU, so padding is left with whatever lies in bounds.
    chunk_begin = (bounds[chunk.sequence] + chunk.position * kernel_stride).clamp(0, max(total - kernel_stride, 0))
    first_chunk = chunk_bounds[window.sequence] + window.position
    place, offset = (torch.arange(count, device=cu_seqlens.device) for count in (places, kernel_stride))
    in_chunk = (token.position >= 0) & (token.position // kernel_stride < chunks[token.sequence])
    return Windows(
        cu_seqlens=window_bounds.int(),
        position=window.position.clamp(min=0) * kernel_stride,
        chunks=(first_chunk + place[:, None]).clamp(0, max(n - 1, 0)),
        chunk_tokens=(chunk_begin[:, None] + offset).flatten(),
        token_places=torch.where(in_chunk, chunk_bounds[token.sequence] * kernel_stride + token.position, -1),
        token_position=token.position,
    )


def linear_compression(
    x: Tensor, weight: Tensor, windows: Windows, kernel_stride: int, intra_block_pe: Tensor | None = None
) -> Tensor:
    """Each window as a learned linear map of its tokens.

    Args:
        x: [total, num_kv_heads, head_dim], keys before RoPE, or values.
        weight: [num_kv_heads, kernel_size * head_dim, head_dim]; row t * head_dim + d belongs to dimension d of the
            window's token t.
        windows: of x.
        kernel_stride: tokens from one window's start to the next one's.
        intra_block_pe: [num_kv_heads, kernel_size, head_dim], added to the tokens of every window, or None.

    Returns:
        [total // kernel_stride, num_kv_heads, head_dim], dtype of x; unspecified rows beyond windows.cu_seqlens[-1].
    """
    num_kv_heads, _, head_dim = weight.shape
    chunks = (
        _GatherChunks.apply(x, windows.chunk_tokens, windows.token_places).unflatten(1, (-1, kernel_stride)).flatten(2)
    )  # [heads, n, stride * dim]
    # A window's chunk number `place` goes through its own rows of the weight: one product makes them all.
    taps = weight.unflatten(1, (-1, kernel_stride * head_dim)).transpose(1, 2)  # [heads, stride * dim, places, dim]
    products = (chunks @ taps.flatten(2)).unflatten(2, (-1, head_dim))  # [heads, n, places, dim]
    compressed = _add_up(products, windows)
    if intra_block_pe is not None:
        compressed = compressed + intra_block_pe.reshape(num_kv_heads, 1, -1) @ weight
    return compressed.transpose(0, 1).to(x.dtype)


def mean_pooling(x: Tensor, windows: Windows, kernel_size: int, kernel_stride: int) -> Tensor:
    """Each window as the mean of its tokens; arguments and result as in `linear_compression`."""
    chunks = _GatherChunks.apply(x, windows.chunk_tokens, windows.token_places).unflatten(
        1, (-1, kernel_stride)
    )  # [heads, n, stride, dim]
    sums = chunks.sum(2, dtype=torch.promote_types(x.dtype, torch.float32)) / kernel_size  # [heads, n, dim]
    places = kernel_size // kernel_stride
    compressed = _add_up(sums[:, :, None].expand(-1, -1, places, -1), windows)
    return compressed.transpose(0, 1).to(x.dtype)


def _add_up(contributions: Tensor, windows: Windows) -> Tensor:
    """Chunk contributions [heads, n, places, dim] -> windows [heads, n, dim], in fp32 or float64.

    A window is the sum of contributions[chunk, place] over the places of its chunks.
    """
    compute = torch.promote_types(contributions.dtype, torch.float32)
    terms = [contributions[:, :, place].index_select(1, rows) for place, rows in enumerate(windows.chunks)]
    compressed = terms[0].to(compute)
    for term in terms[1:]:
        compressed = compressed + term
    return compressed


class _GatherChunks(torch.autograd.Function):
    """[total, heads, dim] -> [heads, n * kernel_stride, dim]: the tokens of all chunks, by head.

    A token is in one chunk at most, so the gradient is gathered too; that of index_select would be added by atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk_tokens: Tensor, token_places: Tensor) -> Tensor:
        ctx.save_for_backward(token_places)
        return x.transpose(0, 1).index_select(1, chunk_tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (token_places,) = ctx.saved_tensors
        if gradient.shape[1] == 0:
            return gradient.new_zeros((len(token_places), gradient.shape[0], gradient.shape[2])), None, None
        tokens = gradient.transpose(0, 1).index_select(0, token_places.clamp(min=0))
        return torch.where(token_places[:, None, None] < 0, 0, tokens), None, None
