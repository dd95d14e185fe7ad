"""RoPE and the gated sum: their kernels and their twins against float64, as PyTorch sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nsa_reference
import pytest
import torch
from harness import DEVICE, HAS_GPU, Target, skip_unless_usable
from tolerances import Expected, assert_close
from torch import Tensor

from fsa.module.gated_sum import gated_sum
from fsa.module.rope import RopeConfig, RotaryEmbedding, rotate

TARGETS = (
    [
        Target("auto", torch.bfloat16),
        Target("triton", torch.bfloat16),
        Target("triton", torch.float16),
        Target("triton", torch.float32),
        Target("reference", torch.bfloat16),
    ]
    if HAS_GPU
    else [
        Target("triton", torch.float16),  # under its interpreter, which computes wrong bf16 results
        Target("triton", torch.float32),
        Target("auto", torch.bfloat16),
        Target("reference", torch.float64),
    ]
)
THETA = 500.0


def strided(x: Tensor) -> Tensor:
    """The same rows with a gap after each."""
    padded = x.new_full((*x.shape[:2], x.shape[2] + 24), torch.nan)
    padded[..., : x.shape[2]] = x
    return padded[..., : x.shape[2]]


def transposed(x: Tensor) -> Tensor:
    """The same rows, head by head."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def expanded(x: Tensor) -> Tensor:
    """The first row for all: strides of zero."""
    return x[:1, :1].expand(x.shape)


@dataclass(frozen=True)
class Case:
    """Heads by their shape, and how x of RoPE and the gradients lie in memory."""

    name: str
    total: int = 70
    num_heads: int = 4
    head_dim: int = 64
    layout: Callable[[Tensor], Tensor] = lambda x: x

    def __str__(self) -> str:
        return self.name

    def randn(self, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers, the same in every run."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def heads(self, seed: int, dtype: torch.dtype) -> Tensor:
        """[total, num_heads, head_dim]."""
        return self.randn(self.total, self.num_heads, self.head_dim, seed=seed, dtype=dtype)


CASES = [
    Case("basic"),
    Case("strided", layout=strided),
    Case("transposed", layout=transposed),
    Case("expanded", layout=expanded),
    Case("one_head", num_heads=1),
    Case("three_heads", num_heads=3, head_dim=40),
    Case("more_heads_than_a_tile", total=5, num_heads=23, head_dim=128),
    Case("head_dim_8", head_dim=8),
    Case("head_dim_256", total=9, num_heads=12, head_dim=256),
    Case("one_token", total=1),
    Case("no_token", total=0),
]


def exactly(function: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The result of a function and its gradients, computed in a dtype from the values that the inputs hold."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(dtype))]


def assert_alike(
    function: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor
) -> None:
    """The function's result and gradients are those of the definition, by the rule."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    actual = [out, *torch.autograd.grad(out, inputs, dout)]
    exact, in_dtype = (exactly(definition, inputs, dout, dtype) for dtype in (torch.float64, out.dtype))
    magnitude = exactly(definition, [x.abs() for x in inputs], dout.abs(), torch.float64)
    for number, value in enumerate(actual):
        assert value.dtype == in_dtype[number].dtype
        assert_close(f"result {number}", value, Expected(exact[number], in_dtype[number], magnitude[number]))


def make_tables(case: Case, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Angles [total, head_dim / 2] of positions that are not the rows' numbers, and their cosines and sines."""
    position = torch.arange(case.total, device=DEVICE) * 37 % 1000
    rope = RotaryEmbedding(RopeConfig(head_dim=case.head_dim, rope_theta=THETA, rope_scaling=None)).to(DEVICE)
    return nsa_reference.angles(position, THETA, case.head_dim, None), rope(position, dtype)


def rotated(angle: Tensor, x: Tensor) -> Tensor:
    """The definition; a step of autograd rounds complex gradients, so x is cast outside of it."""
    return nsa_reference.rotated(x, angle)


# ---------------------------------------------------------------------------------------------------------------------
# RoPE
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotate(case: Case, target: Target) -> None:
    skip_unless_usable(target.backend)
    angle, tables = make_tables(case, target.dtype)
    x, dout = (case.layout(case.heads(seed, target.dtype)) for seed in (0, 1))
    turn = functools.partial(rotate, cosine=tables[0], sine=tables[1], backend=target.backend)
    assert_alike(turn, functools.partial(rotated, angle), [x], dout)


def test_rotate_gradcheck() -> None:
    """First and second derivatives."""
    case = Case("small", total=5, head_dim=8)
    _, tables = make_tables(case, torch.float64)
    x = case.heads(0, torch.float64).requires_grad_()
    turn = functools.partial(rotate, cosine=tables[0], sine=tables[1], backend="reference")
    assert torch.autograd.gradcheck(turn, x) and torch.autograd.gradgradcheck(turn, x)


def test_rotate_saves_only_the_tables() -> None:
    case, saved = Case("saved"), []
    _, tables = make_tables(case, torch.float32)

    def record(x: Tensor) -> Tensor:
        saved.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        rotate(case.heads(0, torch.float32).requires_grad_(), *tables)
    assert sorted(saved) == sorted(x.data_ptr() for x in tables)


@pytest.mark.parametrize("name", ["rotate", "_rotate_triton", "_rotate_reference"])
def test_rotate_opcheck(name: str) -> None:
    skip_unless_usable("triton" if "triton" in name else "reference")
    case, dtype = Case("opcheck", total=7, head_dim=8), torch.float32
    _, tables = make_tables(case, dtype)
    for x in (case.heads(0, dtype), transposed(case.heads(0, dtype))):
        torch.library.opcheck(getattr(torch.ops.fsa, name).default, (x.requires_grad_(), *tables, False))


# ---------------------------------------------------------------------------------------------------------------------
# The gated sum
# ---------------------------------------------------------------------------------------------------------------------
def weighted(gates: Tensor, *branches: Tensor) -> Tensor:
    """The definition, in plain PyTorch."""
    gate = gates.unflatten(-1, (3, -1))[..., None]
    return gate[:, 0] * branches[0] + gate[:, 1] * branches[1] + gate[:, 2] * branches[2]


def make_gated(case: Case, dtype: torch.dtype, per_head: bool) -> list[Tensor]:
    """Gates and the branches."""
    gates = case.randn(case.total, 3 * case.num_heads if per_head else 3, seed=4, dtype=dtype).sigmoid()
    return [gates, *(case.heads(seed, dtype) for seed in range(3))]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("per_head", [False, True], ids=["token", "head"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gated_sum(case: Case, per_head: bool, target: Target) -> None:
    skip_unless_usable(target.backend)
    inputs = make_gated(case, target.dtype, per_head)
    dout = case.layout(case.heads(9, target.dtype))
    assert_alike(functools.partial(gated_sum, backend=target.backend), weighted, inputs, dout)


@pytest.mark.parametrize("per_head", [False, True], ids=["token", "head"])
def test_gated_sum_of_strided_branches(per_head: bool) -> None:
    skip_unless_usable("triton")
    gates, *branches = make_gated(CASES[0], torch.float16, per_head)
    inputs = [gates.T.contiguous().T, strided(branches[0]), transposed(branches[1]), expanded(branches[2])]
    dout = CASES[0].heads(9, torch.float16)
    assert_alike(functools.partial(gated_sum, backend="triton"), weighted, inputs, dout)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gates_of_a_wider_dtype_are_not_rounded(backend: str) -> None:
    skip_unless_usable(backend)
    gates, *branches = make_gated(CASES[0], torch.float16, per_head=True)
    gates = make_gated(CASES[0], torch.float32, per_head=True)[0].requires_grad_()
    branches = [x.requires_grad_() for x in branches]
    dout = CASES[0].heads(9, torch.float16)
    out = gated_sum(gates, *branches, backend=backend)
    gradients = torch.autograd.grad(out, [gates, *branches], dout)
    exact = weighted(gates.double(), *(x.double() for x in branches))
    wanted = torch.autograd.grad(exact, [gates, *branches], dout.double())
    for found, right in zip((out, *gradients), (exact, *wanted), strict=True):
        # fp16 rounds once; 2e-6 is what fp32 leaves where the terms of a sum cancel.
        torch.testing.assert_close(found.double(), right.double(), rtol=2.0**-11, atol=2e-6)


@pytest.mark.parametrize("per_head", [False, True], ids=["token", "head"])
def test_gated_sum_gradcheck(per_head: bool) -> None:
    inputs = [x.requires_grad_() for x in make_gated(Case("small", total=5, head_dim=8), torch.float64, per_head)]
    assert torch.autograd.gradcheck(functools.partial(gated_sum, backend="reference"), inputs)


@pytest.mark.parametrize("name", ["gated_sum", "_gated_sum_triton", "_gated_sum_reference"])
def test_gated_sum_opcheck(name: str) -> None:
    skip_unless_usable("triton" if "triton" in name else "reference")
    case = Case("opcheck", total=7, head_dim=8)
    for per_head in (False, True):
        inputs = make_gated(case, torch.float32, per_head)
        backward = getattr(torch.ops.fsa, f"{name}_backward").default
        for dout in (inputs[1], transposed(inputs[1]), expanded(inputs[1])):
            torch.library.opcheck(backward, (dout, *inputs))
        torch.library.opcheck(getattr(torch.ops.fsa, name).default, tuple(x.requires_grad_() for x in inputs))


def test_gated_sum_has_no_second_derivative() -> None:
    inputs = [x.requires_grad_() for x in make_gated(Case("small", total=5, head_dim=8), torch.float32, False)]
    gradients = torch.autograd.grad(gated_sum(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradients[1].sum().backward()


def test_same_bits_every_time() -> None:
    """The gradient of a gate is a sum over all heads of a token."""
    skip_unless_usable("triton")
    case = Case("deterministic", total=40, num_heads=20)
    inputs = [x.requires_grad_() for x in make_gated(case, torch.float16, False)]

    def results() -> tuple[Any, ...]:
        out = gated_sum(*inputs, backend="triton")
        return out, *torch.autograd.grad(out, inputs, case.heads(9, torch.float16))

    assert all(torch.equal(one, other) for one, other in zip(results(), results(), strict=True))


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_31_elements() -> None:
    """Offsets of the last rows."""
    total, num_heads, head_dim, last = 2**31 // (64 * 128) + 9, 64, 128, 50
    case = Case("large", last, num_heads, head_dim)
    ends = [case.heads(seed, torch.bfloat16) for seed in range(3)]
    gates = make_gated(case, torch.bfloat16, False)[0]

    def at_the_end(x: Tensor) -> Tensor:
        whole = x.new_zeros((total, *x.shape[1:]))
        whole[-last:] = x
        return whole

    _, tables = make_tables(case, torch.bfloat16)
    turned = rotate(at_the_end(ends[0]), *map(at_the_end, tables))
    assert torch.equal(turned[-last:], rotate(ends[0], *tables)) and not turned[:-last].any()
    del turned
    inputs, few = ([f(x).requires_grad_() for x in (gates, *ends)] for f in (at_the_end, torch.clone))
    out, wanted = gated_sum(*inputs), gated_sum(*few)
    assert torch.equal(out[-last:], wanted)
    gradients = torch.autograd.grad(out, inputs, at_the_end(ends[1]))
    for gradient, value in zip(gradients, torch.autograd.grad(wanted, few, ends[1]), strict=True):
        assert torch.equal(gradient[-last:], value)
