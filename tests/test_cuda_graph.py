"""A captured call, forward and backward, replays with other inputs: nothing in it reads values on the host."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from harness import DEVICE, MAIN_TARGETS, Target, assert_same_bits, forward, run, skip_unless_usable
from reference import Inputs, Results

import fsa

pytestmark = pytest.mark.gpu
# The same shapes with other values, other selections and other sequences.
FIRST = Case("first", (500, 0, 300), head_dim=64, block_size=64, topk=8)
OTHERS = [
    Case("other", (300, 200, 300), head_dim=64, block_size=64, topk=8),
    Case("one_sequence", (1, 1, 798), head_dim=64, block_size=64, topk=8, num_kv_heads=2),
]
FIELDS = ("q", "k", "v", "topk_idx", "cu_seqlens_q", "cu_seqlens_k", "dout", "dlse")


def _capture(inputs: Inputs, backend: str) -> tuple[torch.cuda.CUDAGraph, Results]:
    """The graph of one forward and backward on these very tensors, and the tensors it writes."""
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))

    def step() -> Results:
        out, lse = forward(inputs, backend)
        return Results(out, lse, *torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse)))

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
    graph, results = _capture(static, target.backend)
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
