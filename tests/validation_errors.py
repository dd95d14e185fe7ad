"""Errors of `check_topk_idx`; test_errors.py runs them and writes docs/errors.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from errors import Bad
from op_errors import ints
from torch import Tensor

import fsa


def _check(topk_idx: Tensor, cu_seqlens_q: Tensor, **options: Any) -> Callable[[], None]:
    return lambda: fsa.check_topk_idx(topk_idx, cu_seqlens_q, **options)


def _selection(*slots: int) -> Tensor:
    """Two KV heads, 128 tokens, all slots unused but those of head 1, token 70."""
    topk_idx = torch.full((2, 128, len(slots)), -1, dtype=torch.int32)
    topk_idx[1, 70] = ints(*slots)
    return topk_idx


VALIDATION = [
    Bad(
        "int64 topk_idx",
        _check(_selection(0).long(), ints(0, 128)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk], got int64 [2, 128, 1]; cast it with .int()",
    ),
    Bad(
        "a flat topk_idx",
        _check(ints(0, 1), ints(0, 128)),
        ValueError,
        "topk_idx must be int32 [num_kv_heads, total_q, topk], got int32 [2]; give every KV head and query token a row "
        "of block ids",
    ),
    Bad(
        "cu_seqlens without the leading 0",
        _check(_selection(0), ints(100, 128)),
        ValueError,
        "cu_seqlens_q must start with 0, got 100; prepend 0 to the sums of the lengths",
    ),
    Bad(
        "lengths instead of their sums",
        _check(_selection(0), ints(0, 100, 28)),
        ValueError,
        "cu_seqlens_q must not decrease, got 28 after 100 at index 2; pass the prefix sums of the lengths",
    ),
    Bad(
        "cu_seqlens_q that leaves tokens out",
        _check(_selection(0), ints(0, 100)),
        ValueError,
        "cu_seqlens_q must end with total_q = 128, got 100; cover every token",
    ),
    Bad(
        "cu_seqlens_k that leaves keys out",
        _check(_selection(0), ints(0, 128), cu_seqlens_k=ints(0, 200), total_k=256),
        ValueError,
        "cu_seqlens_k must end with total_k = 256, got 200; cover every token",
    ),
    Bad(
        "a block beyond the sequence",
        _check(_selection(0, 2), ints(0, 128)),
        ValueError,
        "topk_idx must be -1 or a block of the token's sequence, which has 2 of 64 keys, got 2 at head 1, token 70, "
        "slot 1; count blocks from 0 at the start of the sequence, and fill unused slots with -1",
    ),
    Bad(
        "a negative id other than -1",
        _check(_selection(0, 1, -7), ints(0, 128)),
        ValueError,
        "topk_idx must be -1 or a block of the token's sequence, which has 2 of 64 keys, got -7 at head 1, token 70, "
        "slot 2; count blocks from 0 at the start of the sequence, and fill unused slots with -1",
    ),
    Bad(
        "a block in the future",
        _check(_selection(3, 0), ints(0, 128), block_size=32),
        ValueError,
        "topk_idx must select blocks that begin at or before the last key the token sees, key 70 of its sequence, got "
        "3 at head 1, token 70, slot 0, which begins at key 96; mask future blocks with -1 before the top-k",
    ),
    Bad(
        "a block listed twice",
        _check(_selection(1, -1, 0, 1), ints(0, 128)),
        ValueError,
        "topk_idx must list a block at most once per row, got 1 at head 1, token 70, slot 3 again after slot 0; "
        "replace the repeat with -1 (the op would count it twice)",
    ),
]
