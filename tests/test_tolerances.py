"""The tolerance rule lets rounding pass and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import cases
from reference import Results, dense, torch_arithmetic
from tolerances import Expected, assert_close, assert_results, complaint, expected_results
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = ("out", "lse", "dq", "dk", "dv")


def _case(name: str) -> dict[torch.dtype, tuple[Results, dict[str, Expected]]]:
    case = next(case for case in cases(small=True) if case.name == name)
    found = {}
    for dtype in DTYPES:
        inputs = case.inputs(dtype)
        results = dense(inputs, torch_arithmetic(dtype))
        cast = {n: getattr(results, n) if n == "lse" else getattr(results, n).to(dtype) for n in NAMES}
        found[dtype] = (Results(**cast), expected_results(inputs))
    return found


BASIC = _case("basic")  # some queries attend to nothing: lse holds -inf


def _wrong(change: Callable[[Tensor], None], name: str, dtype: torch.dtype) -> str | None:
    good, expected = BASIC[dtype]
    bad = getattr(good, name).clone()
    change(bad)
    return complaint(name, bad, expected[name])


def _finite_index(name: str) -> tuple[int, ...]:
    return tuple(BASIC[torch.float16][1][name].exact.isfinite().nonzero()[-1].tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_itself_passes(dtype: torch.dtype) -> None:
    assert_results(*BASIC[dtype])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_number_fails(dtype: torch.dtype, name: str, value: float) -> None:
    index = _finite_index(name)
    text = _wrong(lambda x: x.__setitem__(index, value), name, dtype)
    assert text is not None and str(index) in text and "in one but not in the other" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_minus_infinity_must_be_met(value: float) -> None:
    index = tuple(BASIC[torch.float16][1]["lse"].exact.isneginf().nonzero()[0].tolist())
    text = _wrong(lambda x: x.__setitem__(index, value), "lse", torch.float16)
    assert text is not None and str(index) in text


def test_a_missing_nan_fails() -> None:
    exact = torch.tensor([[1.0, math.nan]], dtype=torch.float64)
    expected = Expected(exact, exact.float(), exact)
    assert complaint("out", torch.tensor([[1.0, math.nan]]), expected) is None
    assert complaint("out", torch.tensor([[1.0, 1.0]]), expected) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_relative_error_of_a_few_ulps_fails(dtype: torch.dtype, name: str) -> None:
    """All numbers wrong in the same direction; by more in the gradients in fp32, whose terms cancel."""
    eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps
    factor = 2000 if dtype == torch.float32 and name in ("dq", "dk") else 100 if eps < 1e-5 and name != "lse" else 8
    text = _wrong(lambda x: x.mul_(1 + factor * eps), name, dtype)
    assert text is not None and "allowed" in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_row_fails_and_is_named(dtype: torch.dtype, name: str) -> None:
    expected = BASIC[dtype][1][name].exact
    size = torch.where(expected.isfinite(), expected, 0).abs()
    size = size if name == "lse" else size.norm(dim=-1)
    index = tuple((size == size.max()).nonzero()[0].tolist())
    text = _wrong(lambda x: x[index].mul_(1.05), name, dtype)
    assert text is not None and f"first bad index ({str(index)[1:-1].rstrip(',')}" in text


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_a_row_of_zeros_fails(name: str) -> None:
    size = BASIC[torch.bfloat16][1][name].exact.norm(dim=-1)
    index = tuple((size == size[size > 0].median()).nonzero()[0].tolist())
    assert _wrong(lambda x: x[index].zero_(), name, torch.bfloat16) is not None


def test_zero_must_be_exact() -> None:
    zero = torch.zeros((4, 3), dtype=torch.float64)
    expected = Expected(zero, zero.float(), zero)
    assert complaint("dk", torch.zeros((4, 3)), expected) is None
    assert complaint("dk", torch.full((4, 3), 1e-30), expected) is not None


def test_a_useless_yardstick_fails() -> None:
    """Where PyTorch itself gives NaN the rule cannot pass anything."""
    exact = torch.ones((2, 2), dtype=torch.float64)
    expected = Expected(exact, torch.full((2, 2), math.nan), exact)
    assert complaint("out", torch.ones((2, 2)), expected) is not None


def test_a_wrong_shape_fails() -> None:
    good, expected = BASIC[torch.float16]
    text = complaint("out", good.out[:-1], expected["out"])
    assert text is not None and "shape" in text


def test_nothing_at_all_passes() -> None:
    empty = torch.zeros((0, 2, 8), dtype=torch.float64)
    assert complaint("out", empty.half(), Expected(empty, empty, empty)) is None


def test_all_complaints_are_reported_together() -> None:
    good, expected = BASIC[torch.float16]
    bad = Results(good.out * 2, good.lse, good.dq * 2, good.dk, good.dv)
    with pytest.raises(AssertionError, match=r"(?s)out: error.*\ndq: error"):
        assert_results(bad, expected)
    with pytest.raises(AssertionError, match="dq: error"):
        assert_close("dq", bad.dq, expected["dq"])
