"""check_topk_idx: accepts every legal selection, names the first bad entry of the others (messages: test_errors.py)."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from harness import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import fsa

BLOCK_SIZE = 32
# Two sequences: 70 queries on 70 keys (3 blocks), 40 queries on 100 keys (4 blocks).
CU_SEQLENS_Q = torch.tensor([0, 70, 110], dtype=torch.int32)
CU_SEQLENS_K = torch.tensor([0, 70, 170], dtype=torch.int32)


def legal_selection() -> torch.Tensor:
    """[2, 110, 4]: what every token sees, at most four blocks."""
    last_key = torch.cat([torch.arange(70), torch.arange(40) + 60])
    blocks = torch.arange(4).expand(2, 110, 4)
    return torch.where(blocks <= last_key[:, None] // BLOCK_SIZE, blocks, -1).int()


def check(topk_idx: torch.Tensor, causal: bool = True) -> None:
    fsa.check_topk_idx(topk_idx, CU_SEQLENS_Q, CU_SEQLENS_K, block_size=BLOCK_SIZE, causal=causal, total_k=170)


def test_legal_selection_passes() -> None:
    check(legal_selection())
    check(legal_selection().flip(-1))
    check(torch.full((2, 110, 4), -1, dtype=torch.int32))


def test_blocks_in_the_future_are_legal_without_the_causal_mask() -> None:
    topk_idx = legal_selection()
    topk_idx[1, 5] = torch.tensor([2, -1, 0, 1])
    check(topk_idx, causal=False)
    with pytest.raises(ValueError, match="2 at head 1, token 5, slot 0"):
        check(topk_idx)


def test_the_block_of_the_last_visible_key_is_legal_and_the_next_is_not() -> None:
    topk_idx = torch.full((2, 110, 4), -1, dtype=torch.int32)
    topk_idx[0, 70 + 3, 2] = 1  # query 3 of the second sequence sees keys up to 63
    check(topk_idx)
    topk_idx[0, 70 + 3, 2] = 2
    with pytest.raises(ValueError, match="key 63 of its sequence, got 2 at head 0, token 73, slot 2"):
        check(topk_idx)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(0, 109), st.integers(0, 3), st.sampled_from([-2, -(2**31), 4, 2**31 - 1])
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_first_id_out_of_range_is_named(entries: list[tuple[int, int, int, int]]) -> None:
    topk_idx = legal_selection()
    for head, token, slot, value in entries:
        topk_idx[head, token, slot] = value
    head, token, slot = min(entry[:3] for entry in entries)
    value = int(topk_idx[head, token, slot])
    with pytest.raises(ValueError, match=f"got {value} at head {head}, token {token}, slot {slot};"):
        check(topk_idx)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(106, 109)), min_size=1, max_size=3, unique=True), st.data())
def test_the_first_repeat_is_named(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    # Tokens from 106 on see all four blocks.
    topk_idx = legal_selection()
    for row in rows:
        first, second = sorted(data.draw(st.permutations(range(4)))[:2])
        topk_idx[row] = topk_idx[row][torch.tensor(data.draw(st.permutations(range(4))))]
        topk_idx[(*row, second)] = topk_idx[(*row, first)]
        if row == min(rows):
            expected = f"{int(topk_idx[(*row, first)])} at head {row[0]}, token {row[1]}, slot {second} again"
            expected += f" after slot {first};"
    with pytest.raises(ValueError, match=expected):
        check(topk_idx)


def test_cu_seqlens_k_defaults_to_cu_seqlens_q() -> None:
    topk_idx = legal_selection()[:, :70]
    fsa.check_topk_idx(topk_idx, torch.tensor([0, 70], dtype=torch.int32), block_size=BLOCK_SIZE)


@pytest.mark.parametrize("cu_seqlens", [[0, 0], [0, 0, 0, 0]])
def test_nothing_to_check(cu_seqlens: list[int]) -> None:
    fsa.check_topk_idx(torch.empty((2, 0, 4), dtype=torch.int32), torch.tensor(cu_seqlens, dtype=torch.int32))


def test_sequences_without_tokens() -> None:
    cu_seqlens = torch.tensor([0, 0, 1, 1, 4, 4], dtype=torch.int32)
    topk_idx = torch.zeros((1, 4, 1), dtype=torch.int32)
    fsa.check_topk_idx(topk_idx, cu_seqlens)
    with pytest.raises(ValueError, match="got 1 at head 0, token 3, slot 0"):
        topk_idx[0, 3] = 1
        fsa.check_topk_idx(topk_idx, cu_seqlens)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_it_rejects_is_what_the_op_ignores_or_counts_twice(case: Case) -> None:
    """The verdict on the cases of the end-to-end tests, by the definition written out slot by slot."""
    inputs = case.inputs(torch.float32, torch.device("cpu"))
    arguments = inputs.topk_idx, inputs.cu_seqlens_q, inputs.cu_seqlens_k
    legal = _legal(*(x.tolist() for x in arguments), inputs.block_size, inputs.causal)
    try:
        fsa.check_topk_idx(*arguments, block_size=inputs.block_size, causal=inputs.causal)
        assert legal
    except ValueError:
        assert not legal


def _legal(
    topk_idx: list[list[list[int]]], cu_seqlens_q: list[int], cu_seqlens_k: list[int], block_size: int, causal: bool
) -> bool:
    if cu_seqlens_q[0] != 0 or cu_seqlens_k[0] != 0 or cu_seqlens_q[-1] != len(topk_idx[0]):
        return False
    if sorted(cu_seqlens_q) != cu_seqlens_q or sorted(cu_seqlens_k) != cu_seqlens_k:
        return False
    for rows in topk_idx:
        for sequence, start in enumerate(cu_seqlens_q[:-1]):
            len_q = cu_seqlens_q[sequence + 1] - start
            len_k = cu_seqlens_k[sequence + 1] - cu_seqlens_k[sequence]
            for query, row in enumerate(rows[start : start + len_q]):
                used = [block for block in row if block != -1]
                last_key = min(query + len_k - len_q, len_k - 1) if causal else len_k - 1
                if len(set(used)) < len(used) or any(not 0 <= block * block_size <= last_key for block in used):
                    return False
    return True
