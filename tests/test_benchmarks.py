"""What the benchmarks claim: the statistics of selections, the bound, the exact samples, the shape of a result file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fsa

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind the installed packages: only `benchmarks` comes from here

from benchmarks import bench_selected_attention, exact, harness  # noqa: E402
from benchmarks.bound import Work, backward_bound, count_work, forward_bound  # noqa: E402
from benchmarks.plot import plot_results, shape_of  # noqa: E402
from benchmarks.selections import PATTERNS, make_topk_idx  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402

SHAPE = Shape(tokens=1000, num_kv_heads=2, group_size=3, block_size=64, topk=4, head_dim=32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_selections_are_causal_sorted_and_unique(pattern: str) -> None:
    tokens, topk, block_size = 1000, 6, 64
    topk_idx = make_topk_idx(pattern, tokens, 2, topk, block_size, device="cpu")
    assert topk_idx.shape == (2, tokens, topk) and topk_idx.dtype == torch.int32
    own = torch.arange(tokens) // block_size
    used = topk_idx >= 0
    assert (used.sum(-1) == torch.clamp(own + 1, max=topk)).all()
    assert (topk_idx <= own[:, None]).all()
    later, earlier = topk_idx[..., 1:], topk_idx[..., :-1]
    assert ((later > earlier) | (later == -1)).all()
    for block in (torch.zeros_like(own), own, (own - 1).clamp(min=0)):
        assert (topk_idx == block[:, None]).any(-1).all()


def test_selections_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_topk_idx("trained", 300, 1, 4, 32, device="cpu")
    monkeypatch.setattr("benchmarks.selections._CHUNK_ELEMENTS", 700)
    assert torch.equal(make_topk_idx("trained", 300, 1, 4, 32, device="cpu"), whole)


def test_selections_reject_unknown_patterns() -> None:
    with pytest.raises(ValueError, match="pattern must be one of"):
        make_topk_idx("uniform", 64, 1, 1, 64, device="cpu")


def shared_pairs(topk_idx: Tensor, num_blocks: int, share: float, neighbours: int = 64) -> float:
    """Part of the (token, block) pairs of neighbouring tokens that fall on blocks which `share` of them select."""
    tiles = topk_idx[0].unflatten(0, (-1, neighbours)).flatten(1).long()
    counts = torch.zeros(len(tiles), num_blocks + 1).scatter_add_(1, tiles + 1, torch.ones(tiles.shape))[:, 1:]
    return (counts[counts >= share * neighbours].sum() / counts.sum()).item()


@pytest.mark.parametrize(
    ("pattern", "half", "quarter"),
    [("random", (0.17, 0.25), (0.17, 0.25)), ("trained", (0.22, 0.49), (0.44, 0.73)), ("coherent", (0.7, 1), (0.8, 1))],
)
def test_neighbours_share_blocks(pattern: str, half: tuple[float, float], quarter: tuple[float, float]) -> None:
    tokens, block_size = 16384, 64
    topk_idx = make_topk_idx(pattern, tokens, 1, 16, block_size, device="cpu")[:, tokens // 2 :]
    assert half[0] < shared_pairs(topk_idx, tokens // block_size, 0.5) < half[1]
    assert quarter[0] < shared_pairs(topk_idx, tokens // block_size, 0.25) < quarter[1]


def test_sinks_draw_nearly_every_token() -> None:
    topk_idx = make_topk_idx("sink", 8192, 1, 16, 64, device="cpu")
    counts = torch.bincount(topk_idx[topk_idx >= 0].long(), minlength=128)
    assert counts[1:].max() > 5 * counts[1:].float().mean()


def test_count_work() -> None:
    # Block 0 and the own block, of 4 keys: token t sees min(t + 1, 4) keys in the first and t % 4 + 1 in its own.
    topk_idx = torch.tensor([[[0, -1], [0, -1], [0, -1], [0, -1], [0, 1], [1, 0], [0, 1], [-1, 1]]])
    assert count_work(topk_idx, 4) == Work(slots=4 + 2 + 2 + 2 + 1, pairs=1 + 2 + 3 + 4 + 5 + 6 + 7 + 4)
    assert count_work(torch.tensor([[[1], [7], [0], [-1]]]), 4) == Work(slots=1, pairs=3)  # a hidden block is no work


def test_bound_of_the_design_shape() -> None:
    # 65,536 tokens, 4 heads, top-16 of 64 keys: 4.2 million partials of 128 elements, 1.07 GB in fp16.
    shape = Shape(tokens=65536, num_kv_heads=4, group_size=1, block_size=64, topk=16)
    slots = shape.tokens * 4 * 16
    forward, backward = (bound(shape, Work(slots, slots * 64)) for bound in (forward_bound, backward_bound))
    assert forward.products == pytest.approx(0.174, abs=0.001)
    assert forward.gather == pytest.approx(0.139, abs=0.001)
    assert forward.memory == pytest.approx((2 * 1.0905 + 0.2863) / 4.15, abs=0.001)
    assert forward.ms == forward.memory
    assert backward.products == pytest.approx(2.5 * forward.products)
    assert backward.gather == pytest.approx(2 * forward.gather)
    assert backward.ms == max(backward.products, backward.memory, backward.gather)


@pytest.fixture(scope="module")
def inputs() -> exact.Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(SHAPE.tokens, heads, SHAPE.head_dim, generator=generator, dtype=torch.float64)

    topk_idx = make_topk_idx("random", SHAPE.tokens, SHAPE.num_kv_heads, SHAPE.topk, SHAPE.block_size, device="cpu")
    q, k, v, dout = draw(SHAPE.num_heads), draw(SHAPE.num_kv_heads), draw(SHAPE.num_kv_heads), draw(SHAPE.num_heads)
    return exact.Inputs(q, k, v, dout, topk_idx, SHAPE.block_size)


def test_samples_agree_with_the_reference(inputs: exact.Inputs) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)]
    cu_seqlens = torch.tensor([0, SHAPE.tokens], dtype=torch.int32)
    out, lse = fsa.selected_attention(*leaves, inputs.topk_idx, cu_seqlens, block_size=64, return_lse=True)
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    samples = bench_selected_attention.Samples(inputs)
    errors = samples.forward_errors(out.detach(), lse.detach()) | samples.backward_errors(*gradients)
    assert errors.keys() == {"err_out", "err_dq", "err_dk", "err_dv"}
    assert max(errors.values()) < 1e-12
    assert samples.forward_errors(1.25 * out.detach(), lse)["err_out"] == pytest.approx(0.25)


def test_samples_show_wrong_gradients(inputs: exact.Inputs) -> None:
    samples = bench_selected_attention.Samples(inputs)
    wrong = samples.backward_errors(inputs.q, inputs.k, inputs.v)
    assert min(wrong.values()) > 0.5


def test_csrc_sha256(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "csrc" / "plan").mkdir(parents=True)
    (tmp_path / "csrc" / "plan" / "plan.cu").write_bytes(b"b")
    (tmp_path / "csrc" / "params.h").write_bytes(b"a")
    expected = hashlib.sha256(b"csrc/params.h\0a\0csrc/plan/plan.cu\0b\0").hexdigest()
    assert harness.csrc_sha256(tmp_path) == expected


HEADER = {key: "x" for key in harness.HEADER_KEYS[:-1]}


def make_rows() -> list[dict[str, Any]]:
    """A row as the benchmark makes it, for each pass and backend; dense could not run."""
    times = {"cuda": 1.23456, "triton": 3.0, "dense": None, "bound": 0.5}
    return [
        bench_selected_attention.make_row(
            SHAPE, name, backend, "total", ms, 0.25, **({} if ms else {"note": "out of memory"})
        )
        for name in bench_selected_attention.PASSES
        for backend, ms in times.items()
    ]


def test_result_file(tmp_path: Path) -> None:
    file, rows = tmp_path / "deep" / "result.json", make_rows()
    harness.write_json(file, HEADER, rows)
    result = harness.read_json(file)
    assert list(result) == list(harness.HEADER_KEYS)
    assert result["rows"][0]["ms"] == 1.235  # four digits
    assert [shape_of(row) for row in result["rows"]] == [SHAPE] * len(rows)
    assert "out of memory" in bench_selected_attention.table(result["rows"])

    with pytest.raises(ValueError, match="row lacks"):
        harness.write_json(file, HEADER, [{"bench": "selected_attention"}])
    with pytest.raises(ValueError, match="header lacks"):
        harness.write_json(file, {}, rows)
    file.write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        harness.read_json(file)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "result.json"
    harness.write_json(file, HEADER, make_rows())
    assert bench_selected_attention.main(["--plot-only", str(file)]) == 0
    assert file.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_results({**HEADER, "rows": []}, tmp_path / "empty.png")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_selected_attention.main(["--dry-run", "--shapes", ",".join(SHAPES)]) == 0
    assert "65536 tokens, 4 x 16 heads, d 128, block 64, top 16, coherent" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_selected_attention.main(["--shapes", "everything"])
    assert "must be among quick, targets" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        bench_selected_attention.main(["--shapes", "quick"])


@pytest.mark.gpu
def test_timer_and_memory() -> None:
    x = torch.randn(1 << 26, device="cuda")
    ms = harness.GpuTimer(budget_ms=20).ms(lambda: x + 1)
    assert 0.01 < ms < 50
    assert harness.extra_gib(lambda: (x + 1) * 2) == pytest.approx(0.25, abs=0.01)
