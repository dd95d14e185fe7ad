"""The definition itself: against a loop over queries differentiated by autograd, and its parts against each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import Case, cases
from reference import (
    EXACT,
    MAGNITUDES,
    Arithmetic,
    Inputs,
    Results,
    dense,
    dense_block,
    dense_tokens,
    multiplicity,
    torch_arithmetic,
)
from torch import Tensor

CASES = cases(small=True)
BY_NAME = {case.name: case for case in CASES}


def _attend_one_by_one(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For each query and head list the keys, slot by slot, and take a softmax over the list."""
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=q.dtype)
    begins_q, begins_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for sequence in range(len(begins_q) - 1):
        len_q = begins_q[sequence + 1] - begins_q[sequence]
        len_k = begins_k[sequence + 1] - begins_k[sequence]
        for place in range(len_q):
            token = begins_q[sequence] + place
            for head in range(inputs.num_kv_heads):
                keys = []
                for block in inputs.topk_idx[head, token].tolist():
                    for key in range(block * inputs.block_size, (block + 1) * inputs.block_size):
                        if 0 <= key < len_k and (not inputs.causal or key <= place + len_k - len_q):
                            keys.append(begins_k[sequence] + key)
                if not keys:
                    continue
                for q_head in range(head * inputs.group_size, (head + 1) * inputs.group_size):
                    scores = k[keys, head] @ q[token, q_head] * inputs.scale
                    out[token, q_head] = scores.softmax(0) @ v[keys, head]
                    lse[q_head, token] = scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize(
    "name", ["basic", "repeated_slots", "more_keys", "fewer_keys", "not_causal", "future_blocks", "tiny_sequences"]
)
def test_dense_is_what_autograd_gives(name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float64)
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = _attend_one_by_one(inputs, q, k, v)
    attends = lse.isfinite()
    loss = (out * inputs.dout).sum() + (lse[attends] * inputs.dlse[attends]).sum()
    wanted = Results(out, lse, *torch.autograd.grad(loss, (q, k, v)))
    for what, x in vars(dense(inputs)).items():
        torch.testing.assert_close(x, getattr(wanted, what).detach(), rtol=1e-11, atol=1e-12, msg=what)


def test_a_case_by_hand() -> None:
    """Four keys in one block, scores 0, log 2, log 3 and unseen; the block is listed twice."""
    logs = torch.tensor([0.0, math.log(2), math.log(3), 50.0], dtype=torch.float64)
    one_hot = torch.eye(8, dtype=torch.float64)
    inputs = Inputs(
        q=one_hot[None, None, 0].expand(4, 1, 8),
        k=logs[:, None, None] * one_hot[0],
        v=one_hot[:4, None],
        topk_idx=torch.tensor([0, -1, 0], dtype=torch.int32).expand(1, 4, 3),
        cu_seqlens_q=torch.tensor([0, 4], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 4], dtype=torch.int32),
        block_size=32,
        softmax_scale=1.0,
        causal=True,
        dout=torch.zeros(4, 1, 8, dtype=torch.float64),
        dlse=torch.zeros(1, 4, dtype=torch.float64),
    )
    assert multiplicity(inputs).tolist() == [[[2, 0, 0, 0], [2, 2, 0, 0], [2, 2, 2, 0], [2, 2, 2, 2]]]
    results = dense(inputs)
    torch.testing.assert_close(results.lse[0, :3].exp(), torch.tensor([2.0, 6.0, 12.0], dtype=torch.float64))
    wanted = torch.tensor([1 / 6, 2 / 6, 3 / 6, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(results.out[2, 0], wanted)


@pytest.mark.parametrize(
    "arithmetic", [EXACT, MAGNITUDES, torch_arithmetic(torch.float16)], ids=["exact", "sizes", "fp16"]
)
@pytest.mark.parametrize(
    "name", ["basic", "tiny_sequences", "more_keys", "fewer_keys", "repeated_slots", "ids_out_of_range"]
)
def test_parts_are_rows_of_the_whole(name: str, arithmetic: Arithmetic) -> None:
    """dense_tokens and dense_block, which gather, agree with dense, which masks."""
    inputs = BY_NAME[name].inputs(torch.float16)
    whole = dense(inputs, arithmetic)
    # Sums in another order: the last bit of the dtype to which this arithmetic rounds may differ.
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if arithmetic.operand == torch.float64 else {"rtol": 1e-2, "atol": 5e-3}

    tokens = torch.arange(len(inputs.q)).flip(0)
    out, lse, dq = dense_tokens(inputs, tokens, arithmetic)
    torch.testing.assert_close(out.flip(0), whole.out, **tolerance)
    torch.testing.assert_close(lse.flip(1), whole.lse, **tolerance)
    torch.testing.assert_close(dq.flip(0), whole.dq, **tolerance)

    found = 0
    for sequence, length in enumerate(inputs.cu_seqlens_k.diff().tolist()):
        for head, block in itertools.product(range(inputs.num_kv_heads), range(-(-length // inputs.block_size))):
            keys, dk, dv = dense_block(inputs, head, sequence, block, arithmetic)
            torch.testing.assert_close(dk, whole.dk[keys, head], **tolerance)
            torch.testing.assert_close(dv, whole.dv[keys, head], **tolerance)
            found += len(dk)
    assert found == inputs.k[..., 0].numel()


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("nonfinite")], ids=lambda c: c.name)
def test_what_nobody_sees_changes_nothing(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    clean = inputs.replace(k=inputs.k.nan_to_num(0, 0, 0), v=inputs.v.nan_to_num(0, 0, 0))
    assert not (inputs.k.isfinite().all() and inputs.v.isfinite().all())
    for what, x in vars(dense(inputs)).items():
        torch.testing.assert_close(x, getattr(dense(clean), what), rtol=1e-12, atol=1e-12, msg=what)


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_nan_reaches_who_sees_it_and_nobody_else(name: str) -> None:
    inputs = BY_NAME[f"nan_seen_by_some_{name}"].inputs(torch.float64)
    where = int(getattr(inputs, name).isnan().any(-1)[:, 0].nonzero())
    sees = (multiplicity(inputs)[0, :, where] > 0).nonzero().squeeze(-1)
    selects = (inputs.topk_idx[0] == where // inputs.block_size).any(-1).nonzero().squeeze(-1)
    assert 0 < len(sees) < len(selects) < len(inputs.q)  # some select the block and do not see the key
    results = dense(inputs)
    group = slice(0, inputs.group_size)
    nan_rows = results.dq.isnan().any(-1)
    assert nan_rows[:, group].all(-1).nonzero().squeeze(-1).tolist() == sees.tolist()
    assert not nan_rows[:, group.stop :].any()
