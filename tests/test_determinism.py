"""The same bits from run to run, forward and backward, whatever else the memory held."""

from __future__ import annotations

import pytest
import torch
from cases import Case, any_blocks, first_block_by_all
from harness import CASES, DEVICE, HAS_GPU, LEAN_TARGETS, Target, assert_same_bits, run, skip_unless_usable
from reference import Results

BY_NAME = {case.name: case for case in CASES}
REPEATS = 8 if HAS_GPU else 2
# Contended: many queries add to the keys of few blocks; in the first case to one, in pieces. In the last, neighbouring
# queries share blocks, and CTAs fetch several units of work each.
CONTENDED = [
    Case("one_block", (3000 if HAS_GPU else 150,), topk=2, select=first_block_by_all, head_dim=64 if HAS_GPU else 16),
    Case("few_blocks", (2000, 60) if HAS_GPU else (70,), topk=8 if HAS_GPU else 3, select=any_blocks, head_dim=64),
    Case("shared_blocks", (2000,), num_kv_heads=8, group_size=8, topk=16, head_dim=128, block_size=64)
    if HAS_GPU
    else Case("shared_blocks", (150,), num_kv_heads=2, group_size=4, topk=2, head_dim=16, block_size=64),
]


def _dirty_memory() -> None:
    """What the next allocations may find: other garbage than before."""
    if HAS_GPU:
        blocks = [torch.randn(2**k, device=DEVICE) for k in range(8, 26)]
        del blocks


@pytest.mark.parametrize("target", LEAN_TARGETS, ids=str)
@pytest.mark.parametrize("case", CONTENDED, ids=lambda case: case.name)
def test_runs_agree_bit_for_bit(case: Case, target: Target) -> None:
    skip_unless_usable(target.backend)
    if HAS_GPU and target.backend == "reference":
        pytest.skip("the reference adds dk and dv with atomics on a GPU")
    inputs = case.inputs(target.dtype, DEVICE)
    first = run(inputs, target.backend)
    for _ in range(REPEATS - 1):
        _dirty_memory()
        assert_same_bits(first, run(inputs, target.backend))


def test_a_wrong_bit_is_seen() -> None:
    x = torch.tensor([1.0, torch.nan])
    one, other = Results(*[x] * 5), Results(*[x] * 4, torch.tensor([1.0 + 2**-23, torch.nan]))
    assert_same_bits(one, one)
    with pytest.raises(AssertionError, match="dv differs"):
        assert_same_bits(one, other)
