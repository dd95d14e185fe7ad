"""What the Triton kernels that read and write every row (a head of a token) once have in common."""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from call to call: Triton would compile a kernel anew for multiples of 16, and for 1.
SIZES = ("total", "num_heads")


@triton.jit
def token_and_head(tile, num_heads, TILE_ROWS: tl.constexpr):
    """Token and head, int64, of the rows of a tile; row r is head r % num_heads of token r // num_heads.

    Only the tile's first row is divided in 64 bits, which takes long, and once a tile.
    """
    first_row = tile.to(tl.int64) * TILE_ROWS
    first_token = first_row // num_heads
    row = (first_row - first_token * num_heads).to(tl.int32) + tl.arange(0, TILE_ROWS)
    return first_token + row // num_heads, (row % num_heads).to(tl.int64)
