"""Every case on every backend, forward and backward, against the float64 definition, by the rule of tolerances.py."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from harness import (
    CASES,
    DEVICE,
    LEAN_TARGETS,
    MAIN_TARGETS,
    TARGETS,
    Target,
    assert_same_bits,
    forward,
    problem,
    run,
    skip_unless_usable,
    takes,
)
from reference import Results
from tolerances import assert_close, assert_results, expected_results

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),  # what a backend does not write is NaN
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
]
BY_NAME = {case.name: case for case in CASES}


def _pairs() -> list[object]:
    # Dtypes outside, backends inside: what is expected of a case is computed once a dtype.
    dtypes = dict.fromkeys(target.dtype for target in TARGETS)
    targets = [target for dtype in dtypes for target in TARGETS if target.dtype == dtype]
    pairs = [(case, target) for case in CASES for target in targets if takes(target, case)]
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in pairs]


@pytest.mark.parametrize(("case", "target"), _pairs())
def test_case(case: Case, target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs, expected = problem(case, target.dtype)
    assert_results(run(inputs, target.backend), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Exactly zero, exactly equal: what a tolerance would blur
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_what_is_not_attended_gets_exactly_nothing(target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs = BY_NAME["block_selected_by_none"].inputs(target.dtype, DEVICE)
    results = run(inputs, target.backend)
    empty = results.lse.isneginf()  # [num_heads, total_q]
    assert empty.any() and not empty.all()
    assert (results.out.transpose(0, 1)[empty] == 0).all()
    assert (results.dq.transpose(0, 1)[empty] == 0).all()
    block = slice(inputs.block_size, 2 * inputs.block_size)
    assert (results.dk[block] == 0).all() and (results.dv[block] == 0).all()
    assert not (results.dk == 0).all() and not (results.dv == 0).all()


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
@pytest.mark.parametrize("name", ["fused_qkv", "heads_outside", "last_dimension_strided", "misaligned"])
def test_strides_change_no_bit(name: str, target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs = BY_NAME[name].inputs(target.dtype, DEVICE)
    contiguous = inputs.map(lambda x: x.clone(memory_format=torch.contiguous_format))
    assert inputs.q.stride() != contiguous.q.stride() or inputs.q.storage_offset() != contiguous.q.storage_offset()
    assert_same_bits(run(inputs, target.backend), run(contiguous, target.backend))


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
def test_inputs_are_left_alone(target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs = BY_NAME["basic"].inputs(target.dtype, DEVICE)
    before = inputs.map(torch.clone)
    run(inputs, target.backend)
    for name in ("q", "k", "v", "topk_idx", "cu_seqlens_q", "cu_seqlens_k", "dout", "dlse"):
        assert torch.equal(getattr(inputs, name), getattr(before, name)), name


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of some results, for some inputs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", LEAN_TARGETS, ids=str)
@pytest.mark.parametrize("result", ["out", "lse"])
def test_gradient_of_one_result(result: str, target: Target) -> None:
    """The other gradient is missing then, not zero."""
    skip_unless_usable(target.backend)
    inputs = BY_NAME["more_keys"].inputs(target.dtype, DEVICE)
    other = "dlse" if result == "out" else "dout"
    inputs = inputs.replace(**{other: torch.zeros_like(getattr(inputs, other))})
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = forward(inputs.replace(q=q, k=k, v=v), target.backend)
    loss, gradient = (out, inputs.dout) if result == "out" else (lse, inputs.dlse)
    gradients = torch.autograd.grad(loss, (q, k, v), gradient)
    assert_results(Results(out.detach(), lse.detach(), *gradients), expected_results(inputs))


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradient_of_one_input(name: str, target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs, expected = problem(BY_NAME["ragged_tail_1"], target.dtype)
    x = getattr(inputs, name).detach().requires_grad_()
    out, lse = forward(inputs.replace(**{name: x}), target.backend)
    (gradient,) = torch.autograd.grad((out, lse), x, (inputs.dout, inputs.dlse))
    assert_close(f"d{name}", gradient, expected[f"d{name}"])


# ---------------------------------------------------------------------------------------------------------------------
# cu_seqlens that are no prefix sums
# ---------------------------------------------------------------------------------------------------------------------
HOSTILE_CU_SEQLENS = {
    "negative": [-5, 20, 60],
    "beyond_the_end": [0, 50, 2**31 - 1],
    "all_beyond_the_end": [1000, 2000, 3000],
    "falling": [60, 30, 0],
    "falling_in_the_middle": [0, 50, 20, 60],
    "extremes": [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1],
    "overlapping": [0, 60, 0, 60, 0, 60],
}


@pytest.mark.parametrize("target", LEAN_TARGETS, ids=str)
@pytest.mark.parametrize("which", ["q", "k", "both"])
@pytest.mark.parametrize("name", HOSTILE_CU_SEQLENS)
def test_hostile_cu_seqlens_read_nothing_outside(name: str, which: str, target: Target) -> None:
    """No crash, and nothing but finite numbers from finite inputs: memory outside of the tensors holds NaN here."""
    skip_unless_usable(target.backend)
    good = Case("hostile", (60,), group_size=1, num_kv_heads=1, topk=3).inputs(target.dtype, DEVICE)
    # The tensors are the middles of larger ones.
    surrounded = {}
    for x in ("q", "k", "v", "dout"):
        rows = getattr(good, x)
        nans = torch.full_like(rows, torch.nan)
        surrounded[x] = torch.cat([nans, rows, nans])[len(rows) : 2 * len(rows)]
    hostile = torch.tensor(HOSTILE_CU_SEQLENS[name], dtype=torch.int32, device=DEVICE)
    legal = torch.tensor([0, *[60] * (len(hostile) - 1)], dtype=torch.int32, device=DEVICE)
    inputs = good.replace(
        **surrounded,
        cu_seqlens_q=hostile if which != "k" else legal,
        cu_seqlens_k=hostile if which != "q" else legal,
    )
    results = run(inputs, target.backend)
    for what, x in vars(results).items():
        assert not x.isnan().any() and not x.isposinf().any(), what
        assert what == "lse" or x.isfinite().all(), what
    # And the process goes on: the device has not faulted.
    assert_results(run(good, target.backend), expected_results(good))
