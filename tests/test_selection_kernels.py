"""The kernels that select blocks, Triton's and CUDA's, against scores in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from harness import DEVICE, HAS_GPU, skip_unless_usable
from selection_cases import CASES, CUDA_CASES, DTYPES, Case, Problem, assert_selected, make
from torch import Tensor

pytest.importorskip("triton")

from fsa import backends  # noqa: E402
from fsa.module import cuda_selection, score_chunks, triton_selection  # noqa: E402

BACKENDS = ("triton", "cuda")


def select(problem: Problem, backend: str) -> Tensor:
    """What the kernels of a backend select; skips the test where they cannot run."""
    skip_unless_usable(backend)
    return problem.select(backend)


CASES_AND_BACKENDS = [
    pytest.param(case, backend, id=f"{case.name}-{backend}")
    for backend, cases in (("triton", CASES), ("cuda", CUDA_CASES))
    for case in cases
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("case", "backend"), CASES_AND_BACKENDS)
def test_selection(case: Case, backend: str) -> None:
    problem = make(case)
    assert_selected(select(problem, backend), problem)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", DTYPES[1]), ("cuda", torch.float16 if HAS_GPU else torch.bfloat16)]
)
def test_selection_in_another_dtype(backend: str, dtype: torch.dtype) -> None:
    problem = make(Case("another_dtype", (300, 150), dtype=dtype))
    assert_selected(select(problem, backend), problem)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Chunks of query tokens that begin inside sequences, and tiles at other places."""
    problem = make(Case("chunks", (3, 250, 0, 190), num_kv_heads=2))
    whole = select(problem, backend)
    monkeypatch.setattr(score_chunks, "WORKSPACE_BYTES", 0)
    assert torch.equal(select(problem, backend), whole)


def test_one_row_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in long sequences, whose rows fill a program."""
    problem = make(Case("one_row", (200,), block_size=32, topk=5))
    together = select(problem, "triton")
    monkeypatch.setattr(triton_selection, "KEYS_PER_TILE", 1)
    assert torch.equal(select(problem, "triton"), together)


# The interpreter is slow.
@pytest.mark.parametrize(("length", "backend"), [(600, "triton"), (600, "cuda"), (3000, "cuda")])
def test_ties_go_to_the_lower_id(length: int, backend: str) -> None:
    """Queries of zero: every window weighs the same, and so does every block but the first and the last ones."""

    def zero_queries(q: Tensor, k: Tensor) -> None:
        q.zero_()

    problem = make(Case("ties", (length,), init_blocks=0, topk=4, edit=zero_queries))
    topk_idx = select(problem, backend)
    position = torch.arange(length)
    settled = position >= 64 * 8  # blocks 1 to 4 are complete; block 0 has no window from the left
    own = position[settled, None] // 64
    expected = torch.cat([torch.tensor([[1, 2]]).expand(len(own), 2), own - 1, own], 1)
    assert torch.equal(topk_idx[0, settled].long(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_keys(backend: str) -> None:
    """A window of NaN: its block and the next count as 0 for the queries that see it; others do not notice."""
    case = Case("nan_keys", (500,), local_blocks=1)
    clean = make(case)
    clean_idx = select(clean, backend)
    clean.k[9] = torch.nan  # tokens 144 to 175, block 2
    topk_idx = select(clean, backend)
    assert torch.equal(topk_idx[:, :175], clean_idx[:, :175])
    assert (topk_idx.diff()[topk_idx[..., 1:] >= 0] > 0).all()
    many_blocks = torch.arange(500) >= 64 * 5  # more than topk without block 2
    assert not (topk_idx[:, many_blocks] == 2).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend: str) -> None:
    problem = make(Case("deterministic", (400, 80)))
    assert torch.equal(select(problem, backend), select(problem, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_windows(backend: str) -> None:
    assert select(make(Case("no_tokens", (0, 0))), backend).shape == (1, 0, 4)
    topk_idx = select(make(Case("no_windows", (7,))), backend)
    assert torch.equal(topk_idx, torch.tensor([0, -1, -1, -1], dtype=torch.int32).expand(1, 7, 4))
    # compressed_k has no row
    problem = dataclasses.replace(make(Case("no_keys", (7,))), k=torch.empty(0, 1, 32, dtype=DTYPES[0]))
    topk_idx = select(problem, backend)
    assert torch.equal(topk_idx, torch.tensor([0, -1, -1, -1], dtype=torch.int32).expand(1, 7, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str) -> None:
    """Heads before tokens in memory, and keys that all heads share."""
    problem = make(Case("layouts", (300, 90), num_kv_heads=2, group_size=2))
    # On the device: what is moved there loses its layout.
    q = problem.q.to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)
    k = problem.k.to(DEVICE)[:, :1].expand(-1, 2, -1)
    strided = dataclasses.replace(problem, q=q, k=k)
    plain = dataclasses.replace(problem, q=problem.q, k=k.contiguous())
    assert torch.equal(select(strided, backend), select(plain, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_in_no_sequence(backend: str) -> None:
    """Before the first sequence and behind the last: they select nothing, and the others do not notice."""
    problem = make(Case("some", (300, 90)))
    extended = dataclasses.replace(
        problem,
        q=torch.cat([torch.full_like(problem.q[:70], torch.nan), problem.q, problem.q[:9]]),
        lse=torch.nn.functional.pad(problem.lse, (70, 9), value=torch.nan),
        cu_seqlens=problem.cu_seqlens + 70,
    )
    topk_idx = select(extended, backend)
    assert (topk_idx[:, :70] == -1).all() and (topk_idx[:, -9:] == -1).all()
    assert torch.equal(topk_idx[:, 70:-9], select(problem, backend))


@pytest.mark.parametrize("bounds", ([0, 400, 100, 390], [-5, 100, 250, 10**6]), ids=("falling", "out_of_range"))
def test_hostile_sequences(bounds: list[int]) -> None:
    """Nothing hangs or leads out of bounds, whatever is selected."""
    problem = make(Case("hostile", (300, 60, 30)))
    windows = torch.tensor([0, 10**6, -3, 20], dtype=torch.int32)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    topk_idx = select(dataclasses.replace(problem, cu_seqlens=cu_seqlens, compressed_cu_seqlens=windows), "cuda")
    assert (topk_idx >= -1).all() and (topk_idx <= 390 // 64).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("stride", "arch", "kernels"), [(16, None, "cuda"), (32, None, "triton"), (16, 80, "triton")])
def test_auto_takes_the_kernels_that_there_are(
    monkeypatch: pytest.MonkeyPatch, stride: int, arch: int | None, kernels: str
) -> None:
    skip_unless_usable("cuda")
    if backends.kernel_arch(DEVICE) < 90:
        pytest.skip("no CUDA kernels for block scores here")
    used = []
    for name, module in (("cuda", cuda_selection), ("triton", triton_selection)):
        monkeypatch.setattr(module, "select_blocks", lambda *_, name=name: used.append(name) or torch.empty(0))
    monkeypatch.setattr(backends, "_newest_kernel_arch", arch)
    make(Case("auto", (100,), kernel_stride=stride)).select("auto")
    assert used == [kernels]


def test_workspace_is_bounded() -> None:
    """Of 128K tokens too. Chunks follow each other, and begin at whole tiles of query tokens."""
    for total, num_kv_heads, block_size in ((131072, 4, 64), (131072, 32, 32), (1000, 1, 64)):
        chunks = score_chunks.plan_chunks(total, num_kv_heads, block_size, 64)
        assert [0, *(chunk.end for chunk in chunks)] == [*(chunk.begin for chunk in chunks), total]
        for chunk in chunks:
            assert chunk.begin % 64 == 0 and chunk.begin < chunk.end and chunk.stride * block_size >= chunk.end
            assert 4 * (chunk.end - chunk.begin) * num_kv_heads * chunk.stride <= 64 * 2**20
