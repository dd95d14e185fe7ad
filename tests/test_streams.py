"""Work goes to the current stream of the tensors' device, and calls on two streams do not disturb each other."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from harness import DEVICE, MAIN_TARGETS, Target, assert_same_bits, run, skip_unless_usable
from reference import Inputs, Results

pytestmark = pytest.mark.gpu
CASES = [
    Case(f"stream_{i}", (1500, 700 + i), num_kv_heads=4, group_size=4, head_dim=64, block_size=64, topk=8)
    for i in range(2)
]
SOME_MILLISECONDS = 20_000_000  # clock cycles


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
def test_work_is_ordered_after_what_its_stream_did(target: Target) -> None:
    """The inputs become right only after a while, on the stream of the call; elsewhere it would read NaN."""
    skip_unless_usable(target.backend)
    inputs = CASES[0].inputs(target.dtype, DEVICE)
    wanted = run(inputs, target.backend)
    late = inputs.replace(
        **{name: torch.full_like(getattr(inputs, name), torch.nan) for name in ("q", "k", "v", "dout")}
    )
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SOME_MILLISECONDS)
        for name in ("q", "k", "v", "dout"):
            getattr(late, name).copy_(getattr(inputs, name))
        results = run(late, target.backend)
        # Whoever copies on the same stream finds everything written.
        copies = Results(**{name: x.clone() for name, x in vars(results).items()})
    torch.cuda.synchronize()
    assert_same_bits(copies, wanted)


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
def test_two_streams_at_once(target: Target) -> None:
    skip_unless_usable(target.backend)
    problems: list[Inputs] = [case.inputs(target.dtype, DEVICE) for case in CASES]
    wanted = [run(inputs, target.backend) for inputs in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found: list[tuple[int, Results]] = []
    for _ in range(10):
        for i, (stream, inputs) in enumerate(zip(streams, problems, strict=True)):
            with torch.cuda.stream(stream):
                found.append((i, run(inputs, target.backend)))
    torch.cuda.synchronize()
    for i, results in found:
        assert_same_bits(results, wanted[i])


@pytest.mark.parametrize("target", MAIN_TARGETS, ids=str)
def test_a_device_that_is_not_the_current_one(target: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    skip_unless_usable(target.backend)
    inputs = CASES[0].inputs(target.dtype, DEVICE)
    elsewhere = inputs.map(lambda x: x.to("cuda:1"))
    with torch.cuda.device(0):
        results = run(elsewhere, target.backend)
    assert results.out.device == torch.device("cuda:1")
    moved = Results(**{name: x.to(DEVICE) for name, x in vars(results).items()})
    assert_same_bits(moved, run(inputs, target.backend))
