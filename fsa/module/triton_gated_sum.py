"""The gated sum of the branches in Triton: one pass over them in the forward, one in the backward.

A row is a head of a token. In the backward a program owns all heads of its tokens, so that the gradient of a gate that
the heads share is summed in one place, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.module.triton_rows import SIZES, token_and_head
from triton_ref.common import load_rows, padded_dim, reduce_tile_rows, store_rows


@triton.jit
def load_gate(gates, offsets, exists):
    """A gate a row, as a column, in fp32."""
    return tl.load(gates + offsets, mask=exists, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=SIZES)
def gated_sum_forward_kernel(
    gates,  # [total, 3, num_heads] if HEAD_GATES else [total, 3]
    compressed,  # [total, num_heads, HEAD_DIM]
    selected,  # [total, num_heads, HEAD_DIM]
    sliding,  # [total, num_heads, HEAD_DIM]
    out,  # [total, num_heads, HEAD_DIM]
    total,
    num_heads,
    HEAD_GATES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    token, head = token_and_head(tl.program_id(0), num_heads, TILE_ROWS)
    exists = token < total
    offsets = (token * num_heads + head) * HEAD_DIM
    compressed_tile = load_rows(compressed, offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
    selected_tile = load_rows(selected, offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
    sliding_tile = load_rows(sliding, offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
    if HEAD_GATES:
        gate = token * 3 * num_heads + head
        step = num_heads
    else:
        gate = token * 3
        step = 1
    weighted = load_gate(gates, gate, exists) * compressed_tile
    weighted += load_gate(gates, gate + step, exists) * selected_tile
    weighted += load_gate(gates, gate + 2 * step, exists) * sliding_tile
    store_rows(out, offsets, weighted, exists, HEAD_DIM, PADDED_DIM)


@triton.jit
def store_gate_gradients(dgates, offsets, step, compressed_sums, selected_sums, sliding_sums, exists):
    """Gradients of the three gates of a head or of a token, `step` apart."""
    element = dgates.dtype.element_ty
    tl.store(dgates + offsets, compressed_sums.to(element), mask=exists)
    tl.store(dgates + offsets + step, selected_sums.to(element), mask=exists)
    tl.store(dgates + offsets + 2 * step, sliding_sums.to(element), mask=exists)


@triton.jit
def sum_heads(sums, TILE_TOKENS: tl.constexpr, TILE_HEADS: tl.constexpr):
    """Row sums [TILE_TOKENS * TILE_HEADS] -> token sums [TILE_TOKENS]."""
    return tl.sum(tl.reshape(sums, [TILE_TOKENS, TILE_HEADS]), 1)


@triton.jit(do_not_specialize=SIZES)
def gated_sum_backward_kernel(
    dout,  # [total, num_heads, HEAD_DIM]
    gates,  # [total, 3, num_heads] if HEAD_GATES else [total, 3]
    compressed,  # [total, num_heads, HEAD_DIM]
    selected,  # [total, num_heads, HEAD_DIM]
    sliding,  # [total, num_heads, HEAD_DIM]
    dgates,  # like gates
    dcompressed,  # [total, num_heads, HEAD_DIM]
    dselected,  # [total, num_heads, HEAD_DIM]
    dsliding,  # [total, num_heads, HEAD_DIM]
    dout_token_stride,
    dout_head_stride,
    total,
    num_heads,
    HEAD_GATES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    row = tl.arange(0, TILE_TOKENS * TILE_HEADS)
    first_token = tl.program_id(0).to(tl.int64) * TILE_TOKENS
    token = first_token + row // TILE_HEADS
    compressed_sums = tl.zeros([TILE_TOKENS * TILE_HEADS], tl.float32)
    selected_sums = tl.zeros([TILE_TOKENS * TILE_HEADS], tl.float32)
    sliding_sums = tl.zeros([TILE_TOKENS * TILE_HEADS], tl.float32)
    for first_head in range(0, num_heads, TILE_HEADS):
        head = first_head + row % TILE_HEADS
        exists = (token < total) & (head < num_heads)
        dout_offsets = token * dout_token_stride + head.to(tl.int64) * dout_head_stride
        offsets = (token * num_heads + head) * HEAD_DIM
        # All loads come first: none waits behind a store.
        dout_tile = load_rows(dout, dout_offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
        compressed_tile = load_rows(compressed, offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
        selected_tile = load_rows(selected, offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
        sliding_tile = load_rows(sliding, offsets, exists, HEAD_DIM, PADDED_DIM).to(tl.float32)
        if HEAD_GATES:
            gate = token * 3 * num_heads + head
            step = num_heads
        else:
            gate = token * 3
            step = 1
        compressed_gate = load_gate(gates, gate, exists)
        selected_gate = load_gate(gates, gate + step, exists)
        sliding_gate = load_gate(gates, gate + 2 * step, exists)
        store_rows(dcompressed, offsets, compressed_gate * dout_tile, exists, HEAD_DIM, PADDED_DIM)
        store_rows(dselected, offsets, selected_gate * dout_tile, exists, HEAD_DIM, PADDED_DIM)
        store_rows(dsliding, offsets, sliding_gate * dout_tile, exists, HEAD_DIM, PADDED_DIM)
        compressed_dots = tl.sum(dout_tile * compressed_tile, 1)
        selected_dots = tl.sum(dout_tile * selected_tile, 1)
        sliding_dots = tl.sum(dout_tile * sliding_tile, 1)
        if HEAD_GATES:
            store_gate_gradients(dgates, gate, step, compressed_dots, selected_dots, sliding_dots, exists)
        else:
            compressed_sums += compressed_dots
            selected_sums += selected_dots
            sliding_sums += sliding_dots
    if not HEAD_GATES:
        token = first_token + tl.arange(0, TILE_TOKENS)
        store_gate_gradients(
            dgates,
            token * 3,
            1,
            sum_heads(compressed_sums, TILE_TOKENS, TILE_HEADS),
            sum_heads(selected_sums, TILE_TOKENS, TILE_HEADS),
            sum_heads(sliding_sums, TILE_TOKENS, TILE_HEADS),
            token < total,
        )


def forward(
    gates: torch.Tensor, compressed: torch.Tensor, selected: torch.Tensor, sliding: torch.Tensor
) -> torch.Tensor:
    """The branches times their gates, added up in fp32.

    Args:
        gates: [total, 3] or [total, 3 * num_heads], fp16, bf16 or fp32. All arguments are contiguous.
        compressed, selected, sliding: [total, num_heads, head_dim], fp16, bf16 or fp32, alike.

    Returns:
        [total, num_heads, head_dim], dtype of the branches.
    """
    total, num_heads, head_dim = compressed.shape
    out = compressed.new_empty(compressed.shape)
    if compressed.numel() == 0:
        return out
    padded = padded_dim(head_dim)
    tile_rows = max(1, reduce_tile_rows(padded))
    with torch.cuda.device_of(compressed):
        gated_sum_forward_kernel[(triton.cdiv(total * num_heads, tile_rows),)](
            gates,
            compressed,
            selected,
            sliding,
            out,
            total=total,
            num_heads=num_heads,
            HEAD_GATES=gates.shape[1] != 3,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded,
            TILE_ROWS=tile_rows,
        )
    return out


def backward(
    dout: torch.Tensor,
    gates: torch.Tensor,
    compressed: torch.Tensor,
    selected: torch.Tensor,
    sliding: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the gates and of the branches, summed in fp32.

    Args:
        dout: [total, num_heads, head_dim], dtype of the branches, the last dimension contiguous.
        gates, compressed, selected, sliding: as in `forward`.

    Returns:
        dgates, dcompressed, dselected, dsliding: like what they are the gradients of.
    """
    total, num_heads, head_dim = compressed.shape
    dgates, dcompressed, dselected, dsliding = (x.new_empty(x.shape) for x in (gates, compressed, selected, sliding))
    if compressed.numel() == 0:
        return dgates.zero_(), dcompressed, dselected, dsliding
    padded = padded_dim(head_dim)
    tile_rows = max(1, reduce_tile_rows(padded))
    tile_heads = min(triton.next_power_of_2(num_heads), tile_rows)
    tile_tokens = tile_rows // tile_heads
    with torch.cuda.device_of(compressed):
        gated_sum_backward_kernel[(triton.cdiv(total, tile_tokens),)](
            dout,
            gates,
            compressed,
            selected,
            sliding,
            dgates,
            dcompressed,
            dselected,
            dsliding,
            *dout.stride()[:2],
            total=total,
            num_heads=num_heads,
            HEAD_GATES=gates.shape[1] != 3,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded,
            TILE_TOKENS=tile_tokens,
            TILE_HEADS=tile_heads,
        )
    return dgates, dcompressed, dselected, dsliding
