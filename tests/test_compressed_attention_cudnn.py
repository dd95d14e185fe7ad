"""Compressed attention by cuDNN against dense attention in float64.

On the CPU with plain PyTorch in place of the two calls of cuDNN: which token is in which row of them, what they may
rely on, and the tail. On a Hopper GPU, with cuDNN itself.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from harness import DEVICE, HAS_GPU, peak_memory_of, skip_unless_usable
from reference import Inputs, Places, Results
from tolerances import Expected, assert_results, expected_results
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fsa import set_workspace_limit
from fsa.module import checks
from fsa.module import cudnn_compressed_attention as cudnn_file
from fsa.module.compressed_attention import compressed_attention

CPU = torch.device("cpu")
SPARE_WINDOWS = 3  # rows of compressed_k beyond the last window: full of NaN
HAS_CUDNN = HAS_GPU and torch.cuda.get_device_capability(DEVICE)[0] == 9 and torch.backends.cuda.cudnn_sdp_enabled()


def needs_cudnn(test: Callable[..., None]) -> Callable[..., None]:
    """Runs the test on a Hopper GPU alone."""
    reason = "no Hopper GPU, or cuDNN's attention is off"
    return pytest.mark.gpu(pytest.mark.skipif(HAS_GPU and not HAS_CUDNN, reason=reason)(test))


@dataclass(frozen=True, eq=False)
class OneSequence(Inputs):
    """A problem of selected attention in which every query selects one block, which holds all windows."""

    kernel_size: int = 32
    kernel_stride: int = 16

    @functools.cached_property
    def places(self) -> Places:
        """Token p sees windows up to (p - (kernel_size - 1)) // kernel_stride."""
        token, window = (torch.arange(len(x), device=x.device) for x in (self.q, self.k))
        last = torch.div(token - (self.kernel_size - 1), self.kernel_stride, rounding_mode="floor")
        zero, no_sequence = torch.zeros_like(token), torch.zeros_like(window)
        return Places(zero, zero, last, no_sequence, window)

    @property
    def sizes(self) -> tuple[int, int]:
        """kernel_size and kernel_stride."""
        return self.kernel_size, self.kernel_stride


@dataclass(frozen=True)
class Case:
    """A sequence: `rows` of kernel_stride tokens, and a tail."""

    name: str
    rows: int = 6
    tail: int = 5
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 16
    kernel_size: int = 32
    kernel_stride: int = 16
    scale: float | None = None
    edit: Callable[[OneSequence], object] = lambda inputs: None  # changes values in place
    layout: Callable[[Tensor], Tensor] = lambda x: x  # of q, compressed_k, compressed_v, dout: other strides

    def inputs(self, dtype: torch.dtype, device: torch.device) -> OneSequence:
        """The problem; the same values in every run."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        total = self.kernel_size - 1 + self.kernel_stride * self.rows + self.tail
        windows, num_heads = self.rows + (self.tail > 0), self.num_kv_heads * self.group_size

        def randn(n: int, heads: int) -> Tensor:
            return torch.randn((n, heads, self.head_dim), generator=generator, dtype=torch.float64).to(dtype)

        inputs = OneSequence(
            q=randn(total, num_heads),
            k=randn(windows, self.num_kv_heads),
            v=randn(windows, self.num_kv_heads),
            topk_idx=torch.zeros((self.num_kv_heads, total, 1), dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, total], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, windows], dtype=torch.int32),
            block_size=2**30,
            softmax_scale=self.scale,
            causal=True,
            dout=randn(total, num_heads),
            dlse=torch.zeros((num_heads, total), dtype=torch.promote_types(dtype, torch.float32)),
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
        )
        self.edit(inputs)
        return inputs.map(lambda x: x.to(device))


@functools.lru_cache(maxsize=1)
def problem(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[OneSequence, dict[str, Expected]]:
    """A case's inputs, and what is expected."""
    inputs = case.inputs(dtype, device)
    return inputs, expected_results(inputs)


def with_spare_windows(x: Tensor) -> Tensor:
    """Rows beyond the last window, which nobody may read."""
    return torch.cat([x, x.new_full((SPARE_WINDOWS, *x.shape[1:]), torch.nan)])


def without_spare_windows(x: Tensor) -> Tensor:
    """What is left of a gradient, after a check that it is zero where nobody reads."""
    assert not x[-SPARE_WINDOWS:].any()
    return x[:-SPARE_WINDOWS]


def strided(x: Tensor) -> Tensor:
    """The same rows with a gap after each."""
    padded = x.new_full((*x.shape[:2], x.shape[2] + 24), torch.nan)
    padded[..., : x.shape[2]] = x
    return padded[..., : x.shape[2]]


def heads_first(x: Tensor) -> Tensor:
    """The same values, all tokens of a head together."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def run(inputs: OneSequence, backend: str = "auto", layout: Callable[[Tensor], Tensor] = lambda x: x) -> Results:
    """Both results and the gradients of out, by the public function."""
    q, k, v = (layout(x).requires_grad_() for x in (inputs.q, *map(with_spare_windows, (inputs.k, inputs.v))))
    out, lse = compressed_attention(
        q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        kernel_size=inputs.kernel_size, kernel_stride=inputs.kernel_stride, softmax_scale=inputs.softmax_scale,
        backend=backend,
    )  # fmt: skip
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), layout(inputs.dout))
    return Results(out.detach(), lse.detach(), dq, *map(without_spare_windows, (dk, dv)))


# ---------------------------------------------------------------------------------------------------------------------
# On the CPU, with plain PyTorch for cuDNN
# ---------------------------------------------------------------------------------------------------------------------
def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[batch, num_heads, rows, rows], -inf where masked."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).tril() == 0, -torch.inf)


class PlainPyTorch:
    """In place of cuDNN. Sums in fp32 (float64 for float64) and rounds results, so dk and dv of each residue."""

    def __init__(self) -> None:
        self.forward: list[int] = []  # residues of each call
        self.backward: list[int] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """`_attend`."""
        self.forward.append(q.shape[0])
        queries, keys, values = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        scores = scores_of(queries, keys, scale)
        values = values.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return torch.empty_like(q).copy_(scores.softmax(-1) @ values), scores.logsumexp(-1)

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_attend_backward`; layouts that are not those of q, k and v must always be the same."""
        self.backward.append(q.shape[0])
        _, heads, _, dim = q.shape
        row = dout.stride(2)
        assert dout.stride() == out.stride() == (heads * dim, dim, row, 1) and row % (heads * dim) == 0
        assert lse.is_contiguous() and lse.storage_offset() == 0
        group_size = heads // k.shape[1]
        do, queries, keys, values, outputs = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dout, q, k, v, out)
        )
        probs = torch.exp(scores_of(queries, keys, scale) - lse[..., None])
        keys, values = (x.repeat_interleave(group_size, 1) for x in (keys, values))
        dscores = probs * (do @ values.mT - (do * outputs).sum(-1, keepdim=True)) * scale
        by_head = (dscores.mT @ queries, probs.mT @ do)
        dk, dv = (x.unflatten(1, (-1, group_size)).sum(2).to(k.dtype) for x in by_head)
        return torch.empty_like(q).copy_(dscores @ keys), dk, dv


@pytest.fixture
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> PlainPyTorch:
    """Plain PyTorch in place of cuDNN; any call may come."""
    plain = PlainPyTorch()
    monkeypatch.setattr(cudnn_file, "_attend", plain.attend)
    monkeypatch.setattr(cudnn_file, "_attend_backward", plain.attend_backward)
    monkeypatch.setattr(cudnn_file, "takes", lambda *arguments: True)
    monkeypatch.setattr(checks, "choose_backend", lambda family, x, what: "triton")
    return plain


CPU_CASES = [
    Case("no_tail", tail=0),
    Case("tail_of_one", tail=1, group_size=1),
    Case("longest_tail", tail=15, group_size=3),
    Case("one_row", rows=1, tail=3),
    Case("no_overlap", kernel_size=16, group_size=3),
    Case("windows_of_four_strides", kernel_size=64, group_size=1),
    Case("stride_8", kernel_stride=8, num_kv_heads=1, group_size=4),
    Case("odd_windows", kernel_size=21, kernel_stride=7, tail=2),
    Case("every_token_begins_a_window", kernel_size=4, kernel_stride=1, rows=40, tail=0),
    Case("one_head", num_kv_heads=1, group_size=1, kernel_stride=32, tail=30),
    Case("scale", scale=0.7),
    Case("strided", layout=strided),
    Case("heads_first", layout=heads_first),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_residues_and_tail(case: Case, dtype: torch.dtype, plain_pytorch: PlainPyTorch) -> None:
    inputs, expected = problem(case, dtype, CPU)
    assert_results(run(inputs, layout=case.layout), expected)
    assert plain_pytorch.forward == plain_pytorch.backward == [case.kernel_stride]


@pytest.mark.usefixtures("poisoned_memory", "workspace_limit")
@pytest.mark.parametrize(("residues", "calls"), [(1, [1] * 16), (3, [3] * 5 + [1]), (5, [4] * 4), (15, [8, 8])])
def test_residues_in_several_calls(residues: int, calls: list[int], plain_pytorch: PlainPyTorch) -> None:
    case = Case("several_calls")
    inputs, expected = problem(case, torch.float16, CPU)
    key_bytes = 2 * case.rows * case.head_dim * case.num_kv_heads
    lse_bytes = 4 * case.rows * case.num_kv_heads * case.group_size
    bytes_per_residue = (5 * case.group_size + 2) * key_bytes + lse_bytes
    set_workspace_limit(bytes_per_residue * residues + bytes_per_residue - 1)
    assert_results(run(inputs), expected)
    assert plain_pytorch.backward == calls
    assert sum(plain_pytorch.forward) == 16


@pytest.mark.usefixtures("workspace_limit")
def test_a_residue_is_never_cut(plain_pytorch: PlainPyTorch) -> None:
    inputs, expected = problem(Case("several_calls"), torch.float16, CPU)
    set_workspace_limit(1)
    assert_results(run(inputs), expected)
    assert plain_pytorch.forward == plain_pytorch.backward == [1] * 16


def test_expanded_dout(plain_pytorch: PlainPyTorch) -> None:
    inputs = Case("expanded").inputs(torch.float16, CPU)
    inputs = inputs.replace(dout=inputs.dout[:1, :1, :1].expand(inputs.dout.shape))
    assert_results(run(inputs), expected_results(inputs))
    assert plain_pytorch.backward == [16]


def test_triton_where_it_is_asked_for_or_lse_has_a_gradient(
    plain_pytorch: PlainPyTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from fsa.module import triton_compressed_attention as triton_file

    calls = []

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        calls.append("forward")
        return torch.zeros_like(q), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)

    def backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
        calls.append("backward")
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    monkeypatch.setattr(triton_file, "forward", forward)
    monkeypatch.setattr(triton_file, "backward", backward)
    inputs = Case("wiring").inputs(torch.float16, CPU)
    run(inputs, "triton")
    assert calls == ["forward", "backward"] and not plain_pytorch.forward and not plain_pytorch.backward

    calls.clear()
    q = inputs.q.requires_grad_()
    sizes = {"kernel_size": inputs.kernel_size, "kernel_stride": inputs.kernel_stride}
    _, lse = compressed_attention(q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, **sizes)
    torch.autograd.grad(lse[:, inputs.kernel_size :].sum(), q)
    assert calls == ["backward"] and plain_pytorch.forward and not plain_pytorch.backward


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shapes and settings, without a GPU."""
    monkeypatch.setattr(cudnn_file, "_MIN_ROWS", 128)
    monkeypatch.setattr(cudnn_file, "_runs_on", lambda device: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)

    def taken(
        total: int = 4096,
        heads: int = 8,
        head_dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        windows: int = 255,
        sequences: int = 1,
        device: str = "cuda",
    ) -> bool:
        with FakeTensorMode():
            q = torch.empty((total, heads, head_dim), dtype=dtype, device=device)
            k = torch.empty((windows, 1, head_dim), dtype=dtype, device=device)
            cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device=device)
            return cudnn_file.takes(q, k, cu_seqlens, 32, 16)

    assert taken() and taken(dtype=torch.float16) and taken(head_dim=72) and taken(windows=300)
    assert taken(total=31 + 128 * 16) and not taken(total=31 + 128 * 16 - 1)
    assert not taken(device="cpu") and not taken(sequences=2)
    assert not taken(dtype=torch.float32) and not taken(head_dim=136) and not taken(head_dim=20)
    assert not taken(windows=254)  # fewer than the sequence has
    assert not taken(total=2**19, heads=32, windows=2**15)
    assert not taken(total=0) and not taken(total=31)

    torch.use_deterministic_algorithms(True)
    deterministic = taken()
    torch.use_deterministic_algorithms(False)
    assert not deterministic
    with monkeypatch.context() as off:
        off.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
        assert not taken()
    monkeypatch.setattr(cudnn_file, "_runs_on", lambda device: False)
    assert not taken()


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------
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
    torch.use_deterministic_algorithms(True, warn_only=True)
    run(inputs)
    torch.use_deterministic_algorithms(False)
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
