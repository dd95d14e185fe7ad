"""check_topk_idx: the explicit, synchronising check of what the op never reads on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_block_size, check_cu_seqlens, check_topk_idx_shape
from .reference import token_bounds


def check_topk_idx(
    topk_idx: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    causal: bool = True,
    total_k: int | None = None,
) -> None:
    """Checks the values inside the arguments of `selected_attention`, and waits for the device to do so.

    The op itself treats every bad slot as unused, and clamps cu_seqlens; this says that there is one, and where.

    Args:
        topk_idx: [num_kv_heads, total_q, topk], int32. Legal slots: -1, or a block of the token's own sequence, once
            per row, that begins at or before the last key which the token sees.
        cu_seqlens_q, cu_seqlens_k: [batch + 1], int32, from 0, not decreasing, up to the number of tokens. None: as q.
        block_size: keys per block.
        causal: whether the causal mask applies. If not, blocks in the future are legal.
        total_k: number of keys, to compare with the end of cu_seqlens_k; None: not compared.

    Raises:
        ValueError: names the first bad entry. cu_seqlens come first, then ids out of range, blocks in the future and
            duplicates.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    check_topk_idx_shape(topk_idx)
    check_block_size(block_size)
    check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    _check_bounds("cu_seqlens_q", cu_seqlens_q, "total_q", topk_idx.shape[1])
    _check_bounds("cu_seqlens_k", cu_seqlens_k, "total_k", total_k)
    if topk_idx.numel() == 0:
        return

    bounds = token_bounds(cu_seqlens_q, cu_seqlens_k, topk_idx.shape[1], int(cu_seqlens_k[-1]), causal)
    num_blocks = ((bounds.len_k + block_size - 1) // block_size)[None, :, None]
    entry = _first((topk_idx < -1) | (topk_idx >= num_blocks))
    if entry is not None:
        raise ValueError(
            f"topk_idx must be -1 or a block of the token's sequence, which has {int(num_blocks[0, entry[1], 0])} of "
            f"{block_size} keys, got {_described(topk_idx, entry)}; count blocks from 0 at the start of the sequence, "
            f"and fill unused slots with -1"
        )
    entry = _first((topk_idx.long() * block_size > bounds.last_key[None, :, None]) & (topk_idx >= 0))
    if entry is not None:
        raise ValueError(
            f"topk_idx must select blocks that begin at or before the last key the token sees, key "
            f"{int(bounds.last_key[entry[1]])} of its sequence, got {_described(topk_idx, entry)}, which begins at key "
            f"{int(topk_idx[entry]) * block_size}; mask future blocks with -1 before the top-k"
        )
    ordered = topk_idx.sort(dim=-1).values
    row = _first(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1))
    if row is not None:
        blocks = topk_idx[row].tolist()
        slot = next(i for i, block in enumerate(blocks) if block >= 0 and block in blocks[:i])
        raise ValueError(
            f"topk_idx must list a block at most once per row, got {_described(topk_idx, (*row, slot))} again after "
            f"slot {blocks.index(blocks[slot])}; replace the repeat with -1 (the op would count it twice)"
        )


def _check_bounds(name: str, cu_seqlens: Tensor, total_name: str, total: int | None) -> None:
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start with 0, got {values[0]}; prepend 0 to the sums of the lengths")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(
                f"{name} must not decrease, got {values[i]} after {values[i - 1]} at index {i}; "
                f"pass the prefix sums of the lengths"
            )
    if total is not None and values[-1] != total:
        raise ValueError(f"{name} must end with {total_name} = {total}, got {values[-1]}; cover every token")


def _first(bad: Tensor) -> tuple[int, ...] | None:
    """Index of the first true entry, or None."""
    if not bad.any():
        return None
    flat = int(bad.flatten().int().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), bad.shape))


def _described(topk_idx: Tensor, entry: tuple[int, ...]) -> str:
    head, token, slot = entry
    return f"{int(topk_idx[entry])} at head {head}, token {token}, slot {slot}"
