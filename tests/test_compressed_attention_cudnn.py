"""Compressed attention by cuDNN itself, on a Hopper GPU, against dense attention in float64.

test_cudnn_residues.py has what a CPU can test of it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, HAS_GPU, deterministic_algorithms, peak_memory_of, skip_unless_usable
from one_sequence import Case, OneSequence, heads_first, problem, run, strided
from reference import Results
from tolerances import assert_results, expected_results
from torch import Tensor

from fsa import set_workspace_limit
from fsa.module import cudnn_compressed_attention as cudnn_file
from fsa.module.compressed_attention import compressed_attention

HAS_CUDNN = HAS_GPU and torch.cuda.get_device_capability(DEVICE)[0] == 9 and torch.backends.cuda.cudnn_sdp_enabled()


def needs_cudnn(test: Callable[..., None]) -> Callable[..., None]:
    """Runs the test on a Hopper GPU alone."""
    reason = "no Hopper GPU, or cuDNN's attention is off"
    return pytest.mark.gpu(pytest.mark.skipif(HAS_GPU and not HAS_CUDNN, reason=reason)(test))


def very_negative_scores(inputs: OneSequence) -> None:
    """Scores, and so lse, of about -400: what is masked must not count as 0."""
    inputs.q.abs_().mul_(10)
    inputs.k.abs_().mul_(-10)


GPU_CASES = [
    Case("no_tail", rows=256, tail=0, head_dim=64),
    Case("tail_of_one", rows=255, tail=1, head_dim=64, group_size=1),
    Case("longest_tail", rows=254, tail=15, head_dim=128, group_size=4),
    Case("head_dim_80", rows=257, head_dim=80, group_size=4),
    Case("head_dim_128", rows=256, head_dim=128, group_size=1),
    Case("head_dim_16", rows=200, head_dim=16, group_size=3),
    Case("one_head", rows=200, head_dim=64, num_kv_heads=1, group_size=1),
    Case("one_kv_head", rows=200, head_dim=64, num_kv_heads=1, group_size=16),
    Case("no_overlap", rows=200, head_dim=64, kernel_size=16),
    Case("windows_of_four_strides", rows=200, head_dim=64, kernel_stride=8),
    Case("every_token_begins_a_window", rows=300, tail=0, head_dim=64, kernel_stride=1),
    Case("odd_windows", rows=200, head_dim=64, kernel_size=21, kernel_stride=7),
    Case("rows_64_mod_128", rows=192, head_dim=64, edit=very_negative_scores),
    Case("rows_65_mod_128", rows=193, head_dim=128, edit=very_negative_scores),
    Case("strided", rows=200, head_dim=64, layout=strided),
    Case("heads_first", rows=200, head_dim=64, layout=heads_first),
]


class Calls:
    """Counts the calls of cuDNN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        attend, attend_backward = cudnn_file._attend, cudnn_file._attend_backward

        def counted(*arguments: object) -> object:
            self.forward += 1
            return attend(*arguments)

        def counted_backward(*arguments: object) -> object:
            self.backward += 1
            return attend_backward(*arguments)

        monkeypatch.setattr(cudnn_file, "_attend", counted)
        monkeypatch.setattr(cudnn_file, "_attend_backward", counted_backward)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts the calls of cuDNN, which takes sequences that would be too short, where Triton would run without it."""
    skip_unless_usable("triton")
    monkeypatch.setattr(cudnn_file, "_MIN_ROWS", 128)
    return Calls(monkeypatch)


@needs_cudnn
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results(case: Case, dtype: torch.dtype, cudnn: Calls) -> None:
    inputs, expected = problem(case, dtype, DEVICE)
    assert_results(run(inputs, layout=case.layout), expected)
    assert cudnn.forward and cudnn.backward


@needs_cudnn
@pytest.mark.usefixtures("workspace_limit")
@pytest.mark.parametrize("limit", [1, 3 << 20])
def test_several_calls_of_cudnn(limit: int, cudnn: Calls) -> None:
    inputs, expected = problem(Case("several", rows=256, head_dim=64), torch.bfloat16, DEVICE)
    set_workspace_limit(limit)
    assert_results(run(inputs), expected)
    assert cudnn.backward > 1


@needs_cudnn
def test_layouts_of_dout(cudnn: Calls) -> None:
    """One after the other: what torch built for the first must not run for the others with its strides."""
    inputs = Case("layouts", rows=200, head_dim=64).inputs(torch.bfloat16, DEVICE)
    expanded = inputs.replace(dout=inputs.dout[:1, :1, :1].expand(inputs.dout.shape))
    padded, by_head = (inputs.replace(dout=layout(inputs.dout)) for layout in (strided, heads_first))
    unaligned = inputs.replace(
        dout=torch.cat([inputs.dout.flatten()[:1], inputs.dout.flatten()])[1:].view_as(inputs.dout)
    )
    for changed in (inputs, expanded, padded, by_head, unaligned, inputs):
        assert_results(run(changed), expected_results(changed))
    assert cudnn.backward == 6


@needs_cudnn
def test_out_and_lse_of_triton(cudnn: Calls) -> None:
    """The backward may come here whoever ran the forward, and the other way round."""
    inputs, expected = problem(Case("mixed", rows=200, head_dim=64), torch.bfloat16, DEVICE)
    rest = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, *inputs.sizes, None)
    tensors = (inputs.q, inputs.k, inputs.v)
    operators = [torch.ops.fsa.compressed_attention, torch.ops.fsa._compressed_attention_triton]
    backwards = [torch.ops.fsa._compressed_attention_triton_backward, torch.ops.fsa.compressed_attention_backward]
    for forward, backward in zip(operators, backwards, strict=True):
        out, lse = forward(*tensors, *rest)
        gradients = backward(inputs.dout, None, *tensors, out, lse, *rest)
        assert_results(Results(out, lse, *gradients), expected)
    assert cudnn.forward == cudnn.backward == 1


@needs_cudnn
def test_gradient_of_lse(cudnn: Calls) -> None:
    """Comes from Triton."""
    inputs = Case("lse", rows=200, head_dim=64).inputs(torch.bfloat16, DEVICE)
    inputs = inputs.replace(dlse=torch.randn_like(inputs.dlse))
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    sizes = {"kernel_size": inputs.kernel_size, "kernel_stride": inputs.kernel_stride}
    out, lse = compressed_attention(q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, **sizes)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
    assert_results(Results(out.detach(), lse.detach(), *gradients), expected_results(inputs))
    assert cudnn.forward == 1 and cudnn.backward == 0


@needs_cudnn
def test_what_is_not_taken(cudnn: Calls) -> None:
    case = Case("not_taken", rows=200, head_dim=64)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    assert cudnn_file.takes(inputs.q, inputs.k, inputs.cu_seqlens_q, *inputs.sizes)
    two = torch.tensor([0, 500, len(inputs.q)], dtype=torch.int32, device=DEVICE)
    assert not cudnn_file.takes(inputs.q, inputs.k, two, *inputs.sizes)
    with deterministic_algorithms():
        run(inputs)
    run(case.inputs(torch.float32, DEVICE))
    run(Case("wide", rows=200, head_dim=192).inputs(torch.bfloat16, DEVICE))
    run(Case("short", rows=100, head_dim=64).inputs(torch.bfloat16, DEVICE))
    run(inputs, "triton")
    run(inputs, "reference")
    assert cudnn.forward == cudnn.backward == 0
    run(inputs)
    assert cudnn.forward == cudnn.backward == 1


@needs_cudnn
def test_cuda_graph(cudnn: Calls) -> None:
    """Captured forward and backward replay with other values; nothing waits for the device."""
    case, dtype = Case("graph", rows=200, head_dim=64), torch.bfloat16
    static = case.inputs(dtype, DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static)  # builds and loads what is loaded lazily
    torch.cuda.current_stream().wait_stream(side)
    q, k, v = (x.requires_grad_() for x in (static.q, static.k, static.v))
    sizes = {"kernel_size": static.kernel_size, "kernel_stride": static.kernel_stride}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = compressed_attention(q, k, v, static.cu_seqlens_q, static.cu_seqlens_k, **sizes)
        gradients = torch.autograd.grad(out, (q, k, v), static.dout)
    assert cudnn.forward == cudnn.backward == 2

    other = Case("other_values", rows=200, head_dim=64).inputs(dtype, DEVICE)
    with torch.no_grad():
        for name in ("q", "k", "v", "dout"):
            getattr(static, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    assert_results(Results(out.detach(), lse.detach(), *gradients), expected_results(other))


@needs_cudnn
def test_no_synchronisation(cudnn: Calls) -> None:
    inputs = Case("no_wait", rows=200, head_dim=64).inputs(torch.bfloat16, DEVICE)
    k, v = inputs.k, inputs.v
    rest = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, *inputs.sizes, None)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, lse = torch.ops.fsa.compressed_attention(inputs.q, k, v, *rest)
            torch.ops.fsa.compressed_attention_backward(inputs.dout, None, inputs.q, k, v, out, lse, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cudnn.forward == cudnn.backward == 2


@needs_cudnn
@pytest.mark.usefixtures("workspace_limit")
def test_memory(cudnn: Calls) -> None:
    """Forward and backward keep to the workspace limit."""
    limit = 128 << 20
    set_workspace_limit(limit)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = ((32768, 16, 128), (2047, 4, 128), (2047, 4, 128), (32768, 16, 128))
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=DEVICE) for shape in shapes)
    cu_seqlens, compressed_cu_seqlens = (torch.tensor([0, len(x)], dtype=torch.int32, device=DEVICE) for x in (q, k))
    rest = (cu_seqlens, compressed_cu_seqlens, 32, 16, None)
    out, lse = torch.ops.fsa.compressed_attention(q, k, v, *rest)

    def backward() -> tuple[Tensor, ...]:
        return torch.ops.fsa.compressed_attention_backward(dout, None, q, k, v, out, lse, *rest)  # type: ignore[no-any-return]

    backward()
    assert cudnn.backward > 1
    outputs = sum(x.nbytes for x in (q, lse))
    assert peak_memory_of(lambda: torch.ops.fsa.compressed_attention(q, k, v, *rest)) <= outputs + limit
    assert peak_memory_of(backward) <= sum(x.nbytes for x in (q, k, v)) + limit
