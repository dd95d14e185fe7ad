"""Compressed attention by cuDNN, with plain PyTorch in place of its two calls, against dense attention in float64.

On the CPU: which token is in which row of the calls, what they may rely on, the tail, and what comes here at all.
"""

from __future__ import annotations

import pytest
import torch
from harness import deterministic_algorithms
from one_sequence import Case, heads_first, problem, run, strided
from tolerances import assert_results, expected_results
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fsa import set_workspace_limit
from fsa.module import checks
from fsa.module import cudnn_compressed_attention as cudnn_file
from fsa.module.compressed_attention import compressed_attention

CPU = torch.device("cpu")


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

    with deterministic_algorithms():
        assert not taken()
    with monkeypatch.context() as off:
        off.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
        assert not taken()
    monkeypatch.setattr(cudnn_file, "_runs_on", lambda device: False)
    assert not taken()
