"""The one rule by which results are compared, for out, lse, dq, dk and dv alike.

    |x - exact|  <=  2 |torch - exact|  +  u |exact|  +  4 u32 |magnitude|

`exact` is the dense float64 answer and `torch` the same formulas in plain PyTorch in the dtype of the test (both from
reference.py). The rule holds twice: with |.| the norm of the whole tensor, and with |.| the largest norm of a row (of a
head of a token; of a single number of lse), so that one wrong row cannot hide in a large tensor. NaN and infinities
must stand in the same places; they are compared first, the norms are of the rest.

The ulp terms, for where PyTorch is exact by luck and a correct backend is not:
u = eps / 2 of the tensor's dtype: a backend rounds a partial result once more than PyTorch does (o_partial and
dq_partial lie in memory in 16 bits), and rounding once errs by at most u relative to what is rounded.
4 u32, u32 = eps / 2 of fp32 (of float64 for float64 tensors): the arithmetic itself. Between its operands and a result
a backend has about four roundings that PyTorch has elsewhere: the score scaled to the log2 domain, exp2 and log2 in
hardware, a division as a reciprocal and a product, sums in another order. Each errs relative to the terms of a sum, not
to the sum, and terms cancel (the exact gradient of a query that attends to one key is zero, its terms are not): hence
|magnitude|, the same sums over absolute values.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from reference import EXACT, MAGNITUDES, Inputs, Results, dense, torch_arithmetic
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Expected:
    """What a tensor is compared with."""

    exact: Tensor
    torch: Tensor
    magnitude: Tensor


def expected_results(inputs: Inputs) -> dict[str, Expected]:
    """By name of the result, for inputs small enough for the dense reference."""
    exact, torch, magnitude = (dense(inputs, a) for a in (EXACT, torch_arithmetic(inputs.q.dtype), MAGNITUDES))
    names = [field.name for field in fields(Results)]
    return {name: Expected(getattr(exact, name), getattr(torch, name), getattr(magnitude, name)) for name in names}


def assert_results(actual: Results, expected: dict[str, Expected]) -> None:
    """Every result by the rule; reports all that fail."""
    problems = [complaint(name, getattr(actual, name), wanted) for name, wanted in expected.items()]
    assert not any(problems), "\n".join(text for text in problems if text)


def assert_close(name: str, actual: Tensor, expected: Expected) -> None:
    """One tensor by the rule."""
    text = complaint(name, actual, expected)
    assert text is None, text


def complaint(name: str, actual: Tensor, expected: Expected) -> str | None:
    """What is wrong with a tensor by the rule, and where first; None when nothing is."""
    exact = expected.exact.to(actual.device)
    if actual.shape != exact.shape:
        return f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    for what, marks in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = marks(actual) != marks(exact)
        if differ.any():
            return _report(name, f"{what} in one but not in the other", differ, actual, exact)

    finite = exact.isfinite()

    def finite_rows(x: Tensor) -> Tensor:  # the rest is equal; a single number of lse is a row
        x = torch.where(finite, x.detach().to(exact.device, torch.float64), 0)
        return x.flatten().unsqueeze(-1) if name == "lse" else x

    wanted, magnitude = finite_rows(exact), finite_rows(expected.magnitude)
    error = finite_rows(actual) - wanted
    torch_error = finite_rows(expected.torch) - wanted
    u = torch.finfo(actual.dtype).eps / 2
    u_sums = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps / 2

    # The worst row first: it tells where.
    for what, norm, size in (
        ("the worst row", _worst_row, error.norm(dim=-1, keepdim=True)),
        ("the tensor", torch.linalg.vector_norm, torch.linalg.vector_norm(error)),
    ):
        limit = 2 * norm(torch_error) + u * norm(wanted) + 4 * u_sums * norm(magnitude)
        if not norm(error) <= limit:  # `not <=`, for NaN fails both `<=` and `>`
            numbers = [float(x) for x in (norm(error), limit, norm(torch_error), norm(wanted), norm(magnitude))]
            text = "error of {} {:.3e}, allowed {:.3e} (torch {:.3e}, exact {:.3e}, magnitude {:.3e})"
            # Among n numbers whose norm exceeds the limit, one exceeds limit / sqrt(n).
            bad = ~(size <= limit) & ~(error.abs() <= limit / (error.numel() / size.numel()) ** 0.5)
            return _report(name, text.format(what, *numbers), bad.reshape(exact.shape), actual, exact)
    return None


def _worst_row(x: Tensor) -> Tensor:
    return x.norm(dim=-1).max() if x.numel() else x.new_zeros(())


def _report(name: str, what: str, bad: Tensor, actual: Tensor, exact: Tensor) -> str:
    index = tuple(bad.nonzero()[0].tolist()) if bad.any() else ()
    where = f"first bad index {index}: {actual[index].item():.9g}, exact {exact[index].item():.9g}" if index else "-"
    return f"{name}: {what}; {int(bad.sum())} of {bad.numel()} elements; {where}"
