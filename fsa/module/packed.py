"""Packed sequences: to which sequence a row belongs and where in it the row stands."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Per row of a packed tensor, [n] int64 each."""

    sequence: Tensor  # of a row in no sequence: any
    position: Tensor  # counted from the start of its sequence; -1 for a row in no sequence


def packed_rows(cu_seqlens: Tensor, n: int) -> Rows:
    """Sequence and position of n rows; cu_seqlens is [batch + 1], integers, and is not read on the host.

    Bounds are clamped, so that no value of cu_seqlens leads out of the tensors.
    """
    bounds = cu_seqlens.long().clamp(0, n)
    row = torch.arange(n, device=cu_seqlens.device)
    # The last sequence that starts at or before the row: empty sequences before it are passed over.
    # (Of all bounds: a slice of them is more than Inductor takes.)
    sequence = (torch.searchsorted(bounds, row, right=True) - 1).clamp(0, len(bounds) - 2)
    position = row - bounds[sequence]
    inside = (position >= 0) & (row < bounds[sequence + 1])
    return Rows(sequence, torch.where(inside, position, -1))


def prefix_sums(lengths: Tensor) -> Tensor:
    """[batch] -> [batch + 1], int64: where each sequence begins, and the total."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
