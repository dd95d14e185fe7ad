"""RoPE in Triton: one pass over the heads. A program turns a tile of rows, both halves of each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.module.triton_rows import SIZES, token_and_head
from triton_ref.common import load_rows, store_rows

TILE_PAIRS = 1024  # of a program: 16 bytes a thread and half in 16 bits


@triton.jit(do_not_specialize=SIZES)
def rotate_kernel(
    x,  # [total, num_heads, 2 * HALF]
    cosine,  # [total, HALF], contiguous
    sine,  # [total, HALF], contiguous
    turned,  # [total, num_heads, 2 * HALF], contiguous
    x_token_stride,
    x_head_stride,
    total,
    num_heads,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    token, head = token_and_head(tl.program_id(0), num_heads, TILE_ROWS)
    exists = token < total
    offsets = token * x_token_stride + head * x_head_stride
    first = load_rows(x, offsets, exists, HALF, PADDED_HALF).to(tl.float32)
    second = load_rows(x + HALF, offsets, exists, HALF, PADDED_HALF).to(tl.float32)
    cosines = load_rows(cosine, token * HALF, exists, HALF, PADDED_HALF)
    sines = load_rows(sine, token * HALF, exists, HALF, PADDED_HALF)
    if INVERSE:
        sines = -sines
    offsets = (token * num_heads + head) * (2 * HALF)
    store_rows(turned, offsets, first * cosines - second * sines, exists, HALF, PADDED_HALF)
    store_rows(turned + HALF, offsets, second * cosines + first * sines, exists, HALF, PADDED_HALF)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Turns the pairs (i, i + head_dim / 2) of every head by the angles of its token, in fp32.

    Args:
        x: [total, num_heads, head_dim], fp16, bf16 or fp32, the last dimension contiguous; head_dim even.
        cosine, sine: [total, 1, head_dim / 2], fp32, contiguous.
        inverse: turn by the negative angles instead.

    Returns:
        [total, num_heads, head_dim], dtype of x, contiguous.
    """
    total, num_heads, head_dim = x.shape
    turned = x.new_empty(x.shape)
    if x.numel() == 0:
        return turned
    padded_half = triton.next_power_of_2(head_dim // 2)
    tile_rows = max(1, TILE_PAIRS // padded_half)
    with torch.cuda.device_of(x):
        rotate_kernel[(triton.cdiv(total * num_heads, tile_rows),)](
            x,
            cosine,
            sine,
            turned,
            *x.stride()[:2],
            total=total,
            num_heads=num_heads,
            INVERSE=inverse,
            HALF=head_dim // 2,
            PADDED_HALF=padded_half,
            TILE_ROWS=tile_rows,
        )
    return turned
