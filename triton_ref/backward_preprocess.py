"""backward_preprocess: delta = rowsum(dout * out) - dlse, what the softmax takes off every score's gradient.

dS = P * (dP - delta): the first term comes from the normalisation of out, the second is the gradient through lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_ref.common import SIZES, load_rows, padded_dim, reduce_tile_rows


@triton.jit(do_not_specialize=SIZES)
def backward_preprocess_kernel(
    out,  # [total_q, num_heads, head_dim]
    dout,  # [total_q, num_heads, head_dim], or None: zero
    dlse,  # [num_heads, total_q], or None: zero
    delta,  # [num_heads, total_q]
    out_token_stride,
    out_head_stride,
    dout_token_stride,
    dout_head_stride,
    total_q,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = row // num_heads
    head = row % num_heads
    exists = token < total_q

    row_delta = tl.zeros([TILE_ROWS], tl.float32)
    if dout is not None:
        out_offsets = token * out_token_stride + head * out_head_stride
        dout_offsets = token * dout_token_stride + head * dout_head_stride
        out_tile = load_rows(out, out_offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
        dout_tile = load_rows(dout, dout_offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
        row_delta += tl.sum(out_tile * dout_tile, 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + head * total_q + token, mask=exists, other=0.0)
    tl.store(delta + head * total_q + token, row_delta, mask=exists)


def backward_preprocess(
    out: torch.Tensor, dout: torch.Tensor | None, dlse: torch.Tensor | None, delta: torch.Tensor
) -> None:
    """Fill delta, fp32 [num_heads, total_q].

    Args:
        out: [total_q, num_heads, head_dim].
        dout: gradient of out, same shape and dtype, or None.
        dlse: gradient of lse, contiguous fp32 [num_heads, total_q], or None.
        delta: fp32 [num_heads, total_q].
    """
    total_q, num_heads, head_dim = out.shape
    padded = padded_dim(head_dim)
    tile_rows = reduce_tile_rows(padded)
    backward_preprocess_kernel[(triton.cdiv(total_q * num_heads, tile_rows),)](
        out,
        dout,
        dlse,
        delta,
        *out.stride()[:2],
        *((0, 0) if dout is None else dout.stride()[:2]),
        total_q=total_q,
        num_heads=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        TILE_ROWS=tile_rows,
    )
