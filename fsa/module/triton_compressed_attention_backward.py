"""Compressed attention in Triton, backward: a pass with queries outside for dQ, one with windows outside for dK and dV.

Five products with dQ in parts, one for each tile of windows, move about as many bytes as two more products take time;
so there are seven products and no parts of dQ. Tiles of windows are few programs: their queries, those of all heads of
the group, are cut into splits, whose dK and dV are summed in a fixed order.

    preprocess    delta = rowsum(dout * out) - dlse (the kernel of the selected branch)
    dq            dS = P * (dP - delta),  dQ = softmax_scale dS K
    dkv           dV = P^T dO,  dK = softmax_scale dS^T Q, a part for each split
    reduce_dkv    sum the splits
"""

from __future__ import annotations

import torch
import triton

from fsa.module.triton_compressed_attention_dkv import (
    DKV_TILES,
    REDUCE_ROWS,
    dkv_kernel,
    number_of_splits,
    reduce_dkv_kernel,
)
from fsa.module.triton_compressed_attention_dq import DQ_TILES, dq_kernel
from fsa.module.triton_windows import choose_tiles
from triton_ref.backward_preprocess import backward_preprocess
from triton_ref.common import padded_dim


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    compressed_k: torch.Tensor,
    compressed_v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compressed_cu_seqlens: torch.Tensor,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, compressed_k and compressed_v.

    Args:
        dout: [total, num_heads, head_dim], gradient of out, as `fsa.pipeline.as_kernel_input` leaves it.
        dlse: [num_heads, total], fp32, gradient of lse, or None: zero.
        out, lse: what the forward returned, contiguous; the other arguments are the forward's.

    Returns:
        dq, dk, dv: shapes and dtype of q, compressed_k, compressed_v; rows from compressed_cu_seqlens[-1] on are zero.

    Beside these it allocates delta (fp32 [num_heads, total]) and parts of dK and dV: at most 128 MiB, or twice
    compressed_k in fp32 if that is more.
    """
    total, num_heads, head_dim = q.shape
    max_windows, num_kv_heads, _ = compressed_k.shape
    dq = q.new_empty(q.shape)
    dk, dv = (q.new_empty(compressed_k.shape) for _ in range(2))
    if total == 0 or max_windows == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    k, v, delta = compressed_k, compressed_v, torch.empty_like(lse)
    batch, padded = cu_seqlens.shape[0] - 1, padded_dim(head_dim)
    tensors = (q, k, v, dout, lse, delta, cu_seqlens, compressed_cu_seqlens)
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:2]]
    shape = {"GROUP_SIZE": num_heads // num_kv_heads, "HEAD_DIM": head_dim, "PADDED_DIM": padded}
    windows = {"KERNEL_SIZE": kernel_size, "KERNEL_STRIDE": kernel_stride, "softmax_scale": softmax_scale}
    sizes = {"batch": batch, "max_windows": max_windows}
    with torch.cuda.device_of(q):
        backward_preprocess(out, dout, None if dlse is None else dlse.contiguous(), delta)

        tiles = choose_tiles(DQ_TILES, q)
        num_tiles = triton.cdiv(total, tiles["TILE_Q"])
        dq_kernel[(num_tiles * num_heads,)](
            *tensors, dq, *strides, total=total, num_heads=num_heads, num_tiles=num_tiles,
            **sizes, **windows, **shape, **tiles,
        )  # fmt: skip

        tiles = choose_tiles(DKV_TILES, q)
        splits = number_of_splits(k, total, shape["GROUP_SIZE"], tiles["TILE_Q"], tiles["TILE_K"])
        parts = q.new_empty((2, splits, max_windows, num_kv_heads, head_dim), dtype=torch.float32)
        dkv_kernel[(triton.cdiv(max_windows, tiles["TILE_K"]) * num_kv_heads * splits,)](
            *tensors, parts, *strides, total=total, num_kv_heads=num_kv_heads, num_splits=splits,
            **sizes, **windows, **shape, **tiles,
        )  # fmt: skip
        reduce_dkv_kernel[(triton.cdiv(max_windows * num_kv_heads, REDUCE_ROWS), 2)](
            parts, compressed_cu_seqlens, dk, dv, num_kv_heads=num_kv_heads, num_splits=splits,
            **sizes, HEAD_DIM=head_dim, PADDED_DIM=padded, TILE_ROWS=REDUCE_ROWS,
        )  # fmt: skip
    return dq, dk, dv
