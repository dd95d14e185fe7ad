"""The operators as PyTorch sees them: schema, fake, autograd, torch.compile, autocast, checkpointing. Numbers are
compared with the dense definition elsewhere (test_selected_attention.py); here with the plain eager call."""

from __future__ import annotations

import doctest
import functools
import os
import shutil
from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, HAS_GPU, skip_unless_usable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fsa
from fsa import ops, reference
from fsa.problem import Arguments

# dtypes that a backend takes wherever it runs
OPERATORS = [
    pytest.param("selected_attention", torch.float32, id="auto"),
    pytest.param("_selected_attention_reference", torch.float64, id="reference"),
    pytest.param("_selected_attention_triton", torch.float16, id="triton"),
    pytest.param("_selected_attention_cuda", torch.bfloat16, id="cuda"),
]
GRADIENTS = [(True, True), (True, False), (False, True)]  # of out, of lse
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, "
    "float? softmax_scale, bool causal) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor topk_idx, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, float? softmax_scale, bool causal) "
    "-> (Tensor, Tensor, Tensor)"
)


def make_arguments(
    dtype: torch.dtype,
    tokens: int = 70,
    head_dim: int = 16,
    requires_grad: bool = True,
    device: torch.device = DEVICE,
) -> Arguments:
    """Two sequences, 4 query heads on 2 KV heads, blocks of 32, some slots unused, one query with none."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn((tokens, heads, head_dim), generator=generator).to(device, dtype).requires_grad_(requires_grad)
        for heads in (4, 2, 2)
    )
    topk_idx = torch.randint(-1, tokens // 32 + 1, (2, tokens, 3), generator=generator, dtype=torch.int32)
    topk_idx[0, 5] = -1
    cu_seqlens = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=device)
    return Arguments(q, k, v, topk_idx.to(device), cu_seqlens, cu_seqlens, 32, None, True)


def operator(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator, if its backend runs here."""
    if name != "selected_attention":
        skip_unless_usable(name.removeprefix("_selected_attention_"))
    return getattr(torch.ops.fsa, name).default  # type: ignore[no-any-return]


def finite(lse: Tensor) -> Tensor:
    """lse with 0 where a query attends to nothing."""
    return torch.where(lse.isfinite(), lse, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [param.values[0] for param in OPERATORS])
def test_schema(name: str) -> None:
    assert str(getattr(torch.ops.fsa, name).default._schema) == f"fsa::{name}{SCHEMA}"
    assert str(getattr(torch.ops.fsa, f"{name}_backward").default._schema) == f"fsa::{name}_backward{BACKWARD_SCHEMA}"


@pytest.mark.parametrize(("name", "dtype"), OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(operator(name), make_arguments(dtype))


@pytest.mark.parametrize(("name", "dtype"), OPERATORS)
@pytest.mark.parametrize(("has_dout", "has_dlse"), GRADIENTS)
def test_opcheck_backward(name: str, dtype: torch.dtype, has_dout: bool, has_dlse: bool) -> None:
    arguments = make_arguments(dtype, requires_grad=False)
    out, lse = operator(name)(*arguments)
    dout, dlse = out if has_dout else None, finite(lse) if has_dlse else None
    q, k, v, *rest = arguments
    operator_backward = getattr(torch.ops.fsa, f"{name}_backward").default
    torch.library.opcheck(operator_backward, (dout, dlse, q, k, v, out, lse, *rest))


def test_fake_of_empty_inputs() -> None:
    q, topk_idx = torch.empty(0, 4, 16, device="meta"), torch.empty(2, 0, 3, dtype=torch.int32, device="meta")
    k, cu_seqlens = torch.empty(7, 2, 16, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    out, lse = fsa.selected_attention(q, k, k, topk_idx, cu_seqlens, cu_seqlens, return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((0, 4, 16), (4, 0), torch.float32)


def test_docstring_example() -> None:
    found = doctest.testmod(ops)
    assert found.attempted > 0 and found.failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("use_out", "use_lse"), GRADIENTS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(use_out: bool, use_lse: bool, causal: bool) -> None:
    # On the CPU, where the reference is deterministic to the bit, as gradcheck demands.
    arguments = make_arguments(torch.float64, tokens=40, head_dim=8, device=torch.device("cpu"))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        options = {"block_size": 32, "causal": causal, "return_lse": True, "backend": "reference"}
        out, lse = fsa.selected_attention(q, k, v, *arguments[3:6], **options)  # type: ignore[call-overload]
        return (out,) * use_out + (finite(lse),) * use_lse

    assert torch.autograd.gradcheck(attend, arguments[:3], fast_mode=True)


@pytest.mark.parametrize(("name", "dtype"), OPERATORS)
def test_gradients_of_out_and_of_lse_add_up(name: str, dtype: torch.dtype) -> None:
    op, arguments = operator(name), make_arguments(dtype)
    out, lse = op(*arguments)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = functools.partial(torch.autograd.grad, inputs=arguments[:3], retain_graph=True)
    together = gradients((out, lse), grad_outputs=(dout, dlse))
    of_out, of_lse = gradients(out, grad_outputs=dout), gradients(lse, grad_outputs=dlse)
    for both, one, other in zip(together, of_out, of_lse, strict=True):
        assert (both.double() - one.double() - other.double()).norm() <= 0.01 * both.double().norm()
    assert of_lse[2].count_nonzero() == 0, "lse does not depend on v"


def test_only_what_requires_a_gradient_gets_one() -> None:
    q, k, v, *rest = make_arguments(torch.float32, requires_grad=False)
    out, lse = torch.ops.fsa.selected_attention(q, k, v.requires_grad_(), *rest)
    (out.sum() + finite(lse).sum()).backward()
    assert v.grad is not None and q.grad is None and k.grad is None
    with torch.no_grad():
        assert not torch.ops.fsa.selected_attention(q, k, v, *rest)[0].requires_grad


def test_unused_results_need_no_backward() -> None:
    arguments = make_arguments(torch.float32)
    out, _ = torch.ops.fsa.selected_attention(*arguments)
    (dq,) = torch.autograd.grad((out * 0).sum() + arguments.q.sum(), arguments.q)
    assert torch.equal(dq, torch.ones_like(dq))


# ---------------------------------------------------------------------------------------------------------------------
# A model around the op
# ---------------------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Projections, the op, a projection."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 64), nn.Linear(16, 32), nn.Linear(16, 32)
        self.out = nn.Linear(64, 16)
        self.backend = backend

    def forward(self, x: Tensor, topk_idx: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (self.q, self.k, self.v))
        out, lse = fsa.selected_attention(
            q, k, v, topk_idx, cu_seqlens, block_size=32, return_lse=True, backend=self.backend
        )
        return self.out(out.flatten(1)) + finite(lse).mean(0)[:, None]


def make_model(backend: str = "auto", dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    return Attention(backend).to(DEVICE, dtype)


def model_inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    arguments = make_arguments(dtype, tokens)
    return torch.randn(tokens, 16, device=DEVICE, dtype=dtype), arguments.topk_idx, arguments.cu_seqlens_q


def train_step(model: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The result and the gradients of all parameters."""
    model.zero_grad()
    result = call(*inputs)
    result.float().square().sum().backward()
    return [result.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(actual) == len(expected) == 9
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).double().norm() <= tolerance * e.double().norm()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("auto", torch.float32), ("triton", torch.float16), ("cuda", torch.bfloat16)],
)
def test_compile(backend: str, dtype: torch.dtype) -> None:
    """Forward and backward in one graph each, for two lengths (the second one recompiles with dynamic shapes)."""
    if backend != "auto":
        skip_unless_usable(backend)
    model = make_model(backend, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (70, 100, 130):
        inputs = model_inputs(tokens, dtype)
        expected = train_step(model, model, inputs)
        assert_alike(train_step(model, compiled, inputs), expected, 1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    dtype, tolerance = (torch.bfloat16, 0.02) if HAS_GPU else (torch.float32, 1e-4)
    model, inputs = make_model(dtype=dtype), model_inputs(70, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert_alike(train_step(model, compiled, inputs), train_step(model, model, inputs), tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    """fp32 q, k and v are cast to the autocast dtype; lse stays fp32; gradients come back in fp32."""
    arguments = make_arguments(torch.float32)
    call = functools.partial(fsa.selected_attention, block_size=32, return_lse=True)
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE.type, dtype=dtype):
            out, lse = call(*arguments[:5])
        half = [x.detach().to(dtype).requires_grad_() for x in arguments[:3]]
        expected_out, expected_lse = fsa.selected_attention(*half, *arguments[3:5], block_size=32, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)

        gradients = torch.autograd.grad(out.float().square().sum(), arguments[:3])
        expected = torch.autograd.grad(expected_out.float().square().sum(), half)
        for a, e in zip(gradients, expected, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, e.float(), rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone() -> None:
    arguments = make_arguments(torch.float64)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out, lse = torch.ops.fsa._selected_attention_reference(*arguments)
    assert out.dtype == lse.dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, (x, topk_idx, cu_seqlens) = make_model(), model_inputs(70)
    inputs = x.requires_grad_(), topk_idx, cu_seqlens
    recomputed = functools.partial(checkpoint, model, use_reentrant=use_reentrant)
    assert_alike(train_step(model, recomputed, inputs), train_step(model, model, inputs))


# ---------------------------------------------------------------------------------------------------------------------
# The reference's chunks
# ---------------------------------------------------------------------------------------------------------------------
def test_chunks_of_the_reference_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[Tensor]:
        arguments = make_arguments(torch.float64)
        out, lse = torch.ops.fsa._selected_attention_reference(*arguments)
        return [out, lse, *torch.autograd.grad(out.sum() + finite(lse).sum(), arguments[:3])]

    whole = results()
    for bytes_at_once in (1, 5 * 3 * 32 * 16 * 8):  # one query at a time, five at a time
        monkeypatch.setattr(reference, "_GATHER_BYTES", bytes_at_once)
        for actual, expected in zip(results(), whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
