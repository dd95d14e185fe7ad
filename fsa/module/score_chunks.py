"""Chunks of query tokens whose scores of all blocks fit the workspace of the selection, one after the other.

A token sees at most the blocks up to its index among all tokens, so chunks of early tokens have short rows, and are
longer.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

WORKSPACE_BYTES = 64 * 2**20  # of the scores of a chunk at most, beyond one tile of query tokens
_ALIGNMENT = 16  # scores; a multiple of what kernels load at once


def row_stride(chunk_end: int, block_size: int) -> int:
    """Scores that a query token of a chunk has at most, rounded up so that rows are aligned."""
    return -(-chunk_end // (block_size * _ALIGNMENT)) * _ALIGNMENT


def chunks(total: int, num_kv_heads: int, block_size: int, tile_q: int) -> Iterator[tuple[int, int]]:
    """(first query token, the one behind the last) of every chunk.

    Each is as long as its scores fit the workspace, and one tile of query tokens at least.
    """
    bounds = [0]
    while bounds[-1] < total:
        begin = bounds[-1]
        sizes = range(tile_q, total - begin + tile_q, tile_q)
        fitting = bisect.bisect_right(
            sizes,
            WORKSPACE_BYTES // (4 * num_kv_heads),
            key=lambda tokens: tokens * row_stride(min(begin + tokens, total), block_size),
        )
        bounds.append(min(begin + max(fitting, 1) * tile_q, total))
    return itertools.pairwise(bounds)
