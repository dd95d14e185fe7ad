"""Chunks of query tokens whose scores of all blocks fit the workspace of the selection, one after the other.

A token sees at most the blocks up to its index among all tokens, so chunks of early tokens have short rows, and are
longer.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tiling import ceil_div

WORKSPACE_BYTES = 64 * 2**20  # of the scores of a chunk at most, beyond one tile of query tokens
_ALIGNMENT = 16  # scores; a multiple of what kernels load at once


@dataclass(frozen=True)
class ScoreChunk:
    """The query tokens [begin, end), and how far their rows of scores are apart."""

    begin: int
    end: int
    stride: int  # scores


def _row_stride(chunk_end: int, block_size: int) -> int:
    """Scores that a query token of a chunk has at most, rounded up so that rows are aligned."""
    return ceil_div(chunk_end, block_size * _ALIGNMENT) * _ALIGNMENT


def _end_of_chunk(begin: int, total: int, num_kv_heads: int, block_size: int, tile_q: int) -> int:
    sizes = range(tile_q, total - begin + tile_q, tile_q)
    fitting = bisect.bisect_right(
        sizes,
        WORKSPACE_BYTES // (4 * num_kv_heads),
        key=lambda tokens: tokens * _row_stride(min(begin + tokens, total), block_size),
    )
    return min(begin + max(fitting, 1) * tile_q, total)


def plan_chunks(total: int, num_kv_heads: int, block_size: int, tile_q: int) -> list[ScoreChunk]:
    """Chunks of all query tokens, each as long as its scores fit, and one tile of query tokens at least."""
    chunks: list[ScoreChunk] = []
    begin = 0
    while begin < total:
        end = _end_of_chunk(begin, total, num_kv_heads, block_size, tile_q)
        chunks.append(ScoreChunk(begin, end, _row_stride(end, block_size)))
        begin = end
    return chunks


def empty_scores(chunks: list[ScoreChunk], num_kv_heads: int, device: torch.device) -> Tensor:
    """Room for the scores of any one of the chunks, fp32: [most of them]."""
    most = max((chunk.end - chunk.begin) * num_kv_heads * chunk.stride for chunk in chunks)
    return torch.empty(most, dtype=torch.float32, device=device)
