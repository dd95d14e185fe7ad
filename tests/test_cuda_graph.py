"""A captured call, forward and backward, replays with other inputs: nothing in it reads values on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import pytest
import torch
from cases import Case
from harness import DEVICE, MAIN_TARGETS, Target, assert_same_bits, forward, run, skip_unless_usable
from module_inputs import cu_seqlens_of, randn
from reference import Results
from torch import Tensor

import fsa
from fsa.module import cudnn_compressed_attention

pytestmark = pytest.mark.gpu
# The same shapes with other values, other selections and other sequences.
FIRST = Case("first", (500, 0, 300), group_size=4, head_dim=64, block_size=64, topk=8)
OTHERS = [
    Case("other", (300, 200, 300), group_size=4, head_dim=64, block_size=64, topk=8),
    Case("one_sequence", (1, 1, 798), group_size=4, head_dim=64, block_size=64, topk=8, num_kv_heads=2),
]
FIELDS = ("q", "k", "v", "topk_idx", "cu_seqlens_q", "cu_seqlens_k", "dout", "dlse")
T = TypeVar("T")


def _capture(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of a step, and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles and loads what is loaded lazily
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
@pytest.mark.parametrize("limit", [2**30, 2**20], ids=["one_chunk", "chunks"])
@pytest.mark.usefixtures("workspace_limit")
def test_replay_with_other_inputs(limit: int, target: Target) -> None:
    skip_unless_usable(target.backend)
    fsa.set_workspace_limit(limit)
    static = FIRST.inputs(target.dtype, DEVICE)
    q, k, v = (x.requires_grad_() for x in (static.q, static.k, static.v))

    def step() -> Results:
        out, lse = forward(static, target.backend)
        return Results(out, lse, *torch.autograd.grad((out, lse), (q, k, v), (static.dout, static.dlse)))

    graph, results = _capture(step)
    for case in (*OTHERS, FIRST):
        inputs = case.inputs(target.dtype, DEVICE)
        with torch.no_grad():
            for name in FIELDS:
                getattr(static, name).copy_(getattr(inputs, name))
        for x in vars(results).values():
            x.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        replayed = Results(**{name: x.detach().clone() for name, x in vars(results).items()})
        assert_same_bits(replayed, run(inputs, target.backend))


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
def test_no_synchronisation(target: Target) -> None:
    """PyTorch raises on its own operators that wait for the device; the capture above, on everybody's."""
    skip_unless_usable(target.backend)
    inputs = FIRST.inputs(target.dtype, DEVICE)
    run(inputs, target.backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, target.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# The module. Its backward is compared by norms: torch's sliding window and cuDNN add up dq in any order.
# ---------------------------------------------------------------------------------------------------------------------
DTYPE = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN = 8, 2, 64, 128
# What is captured, and what is replayed: as many tokens and sequences.
LENGTHS = {
    "packed": ((500, 0, 300), (331, 450, 19), (0, 0, 800)),  # some shorter than a window, or empty
    "one_sequence": ((2200,), (2200,)),  # cuDNN attends to compressed keys on Hopper (`shorter_for_cudnn`)
}
MODULE_CASES = [
    pytest.param(backend, lengths, id=f"{backend}-{name}")
    for name, lengths in LENGTHS.items()
    for backend in ("cuda", "triton")
]


@pytest.fixture
def shorter_for_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes 2,200 tokens, too."""
    monkeypatch.setattr(cudnn_compressed_attention, "_MIN_ROWS", 128)


class ModuleInputs(NamedTuple):
    """What `attend` takes, and the gradient of what it returns."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    cu_seqlens: Tensor
    dout: Tensor

    @classmethod
    def draw(cls, lengths: tuple[int, ...], seed: int) -> ModuleInputs:
        """Others for each seed; q, k, v and gates require gradients."""
        heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
        q, k, v, dout = (
            randn(sum(lengths), n, HEAD_DIM, seed=4 * seed + i, dtype=DTYPE, device=DEVICE) for i, n in enumerate(heads)
        )
        gates = randn(sum(lengths), 3, seed=100 + seed, dtype=DTYPE, device=DEVICE).sigmoid()
        for x in (q, k, v, gates):
            x.requires_grad_()
        return cls(q, k, v, gates, cu_seqlens_of(lengths, DEVICE), dout)


def _make_module(backend: str) -> fsa.FlashSparseAttention:
    torch.manual_seed(0)
    return fsa.FlashSparseAttention(
        hidden_size=HIDDEN, num_q_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, kernel_size=32,
        kernel_stride=16, block_size=64, topk=4, init_blocks=1, local_blocks=2, window_size=64,
        rope_config=fsa.RopeConfig(head_dim=HEAD_DIM), backend=backend,
    ).to(DEVICE, DTYPE)  # fmt: skip


def _attend(module: fsa.FlashSparseAttention, inputs: ModuleInputs) -> list[Tensor]:
    """The output, and the gradients of q, k, v, gates and the parameters of the compression."""
    q, k, v, gates, cu_seqlens, dout = inputs
    out = module.attend(q, k, v, gates, cu_seqlens)
    leaves = (q, k, v, gates, module.compress_key, module.compress_value, module.intra_block_pe)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _assert_alike(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The first, an output, bit for bit; the others, gradients, by norms."""
    assert torch.equal(actual[0], expected[0])
    for i, (a, e) in enumerate(zip(actual[1:], expected[1:], strict=True)):
        assert float((a - e).double().norm()) <= 0.01 * float(e.double().norm()), f"gradient {i}"


@pytest.mark.usefixtures("shorter_for_cudnn")
@pytest.mark.parametrize(("backend", "lengths"), MODULE_CASES)
def test_replay_of_the_module_with_other_inputs(backend: str, lengths: tuple[tuple[int, ...], ...]) -> None:
    skip_unless_usable(backend)
    module, static = _make_module(backend), ModuleInputs.draw(lengths[0], seed=0)
    graph, results = _capture(lambda: _attend(module, static))
    for seed, others in reversed(list(enumerate(lengths))):
        inputs = ModuleInputs.draw(others, seed)
        with torch.no_grad():
            for x, other in zip(static, inputs, strict=True):
                x.copy_(other)
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        _assert_alike([x.clone() for x in results], _attend(module, inputs))


@pytest.mark.usefixtures("shorter_for_cudnn")
@pytest.mark.parametrize(("backend", "lengths"), MODULE_CASES)
def test_training_step_through_a_graphed_module(backend: str, lengths: tuple[tuple[int, ...], ...]) -> None:
    """As in the README; the graph sees what the optimizer did to the parameters."""
    skip_unless_usable(backend)
    module = _make_module(backend)
    eager = copy.deepcopy(module)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        x = randn(sum(lengths[seed]), HIDDEN, seed=seed, dtype=DTYPE, device=DEVICE)
        return x.requires_grad_(), cu_seqlens_of(lengths[seed], DEVICE)

    def step(attention: fsa.FlashSparseAttention) -> list[Tensor]:
        """The output and the gradients; the optimizer steps afterwards."""
        x, cu_seqlens = draw(1)
        out = attention(x, cu_seqlens)
        out.float().square().sum().backward()
        optimizer = torch.optim.SGD(attention.parameters(), lr=1e-3)
        found = [out.detach(), x.grad, *(p.grad for p in attention.parameters())]
        copies = [tensor.clone() for tensor in found if tensor is not None]
        assert len(copies) == len(found)
        optimizer.step()
        return copies

    graphed = torch.cuda.make_graphed_callables(module, draw(0))
    assert isinstance(graphed, fsa.FlashSparseAttention)
    actual = step(graphed)
    _assert_alike(actual, step(eager))
    eager.load_state_dict(graphed.state_dict())
    x, cu_seqlens = draw(1)
    after = graphed(x, cu_seqlens).detach()
    assert not torch.equal(after, actual[0])
    assert torch.equal(after, eager(x, cu_seqlens))
