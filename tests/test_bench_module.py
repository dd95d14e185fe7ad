"""What the module's benchmark claims: its parts make up the module, its rows, table and pictures. Without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fsa

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind the installed packages: only `benchmarks` comes from here

from benchmarks import bench_nsa_module, harness  # noqa: E402
from benchmarks.plot_module import BRANCHES, module_shape_of, plot_branches, plot_tokens  # noqa: E402
from benchmarks.shapes import MODULE_SHAPES, ModuleShape  # noqa: E402

SHAPE = ModuleShape(
    tokens=300, num_kv_heads=2, group_size=3, head_dim=32, block_size=32, topk=4, kernel_size=16, kernel_stride=8,
    window_size=40,
)  # fmt: skip
HEADER = {key: "x" for key in harness.HEADER_KEYS[:-1]}


@pytest.fixture(scope="module")
def module() -> fsa.FlashSparseAttention:
    torch.manual_seed(0)
    return bench_nsa_module.make_module(SHAPE, "reference", device="cpu").float()


@pytest.fixture(scope="module")
def inputs() -> bench_nsa_module.Inputs:
    drawn = bench_nsa_module.Inputs.draw(SHAPE, device="cpu")
    return bench_nsa_module.Inputs(*(x.detach().float().requires_grad_() for x in drawn))


@pytest.fixture(scope="module")
def parts(module: fsa.FlashSparseAttention, inputs: Any) -> dict[str, bench_nsa_module.Part]:
    return bench_nsa_module.module_parts(module, inputs)


def test_the_parts_make_up_the_module(parts: dict[str, bench_nsa_module.Part], inputs: Any) -> None:
    assert {"total", *BRANCHES} == {*parts, "gates"}
    attended = [parts[name].call()[0] for name in ("compressed_attention", "selected_attention", "sliding_window")]
    gated = sum(gate[:, None, None] * out for gate, out in zip(inputs.gates.unbind(1), attended, strict=True))
    torch.testing.assert_close(parts["total"].call()[0], gated)


def test_gradients_flow_to_the_leaves_of_every_part(parts: dict[str, bench_nsa_module.Part]) -> None:
    assert [name for name, part in parts.items() if not part.leaves] == ["selection"]
    for call, leaves in (part for part in parts.values() if part.leaves):
        outputs = call()
        gradients = torch.autograd.grad(outputs, leaves, [torch.randn_like(x) for x in outputs], retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("repeat", [False, True])
def test_dense_takes_the_same_tensors(inputs: Any, repeat: bool) -> None:
    part = bench_nsa_module.dense_part(inputs, repeat)
    assert [x.shape[1] for x in part.leaves] == [6, 6, 6] if repeat else [6, 2, 2]
    assert all(x.shape[2:] == (300, 32) and x.is_leaf and x.requires_grad for x in part.leaves)


def test_the_rest_completes_the_total() -> None:
    measured = {"total": harness.Measured(10.0, 0, 0), "rope": harness.Measured(3.0, 0, 0)}
    assert bench_nsa_module.rest_ms(measured) == 7
    assert bench_nsa_module.rest_ms(measured | {"selection": harness.Measured(9.0, 0, 0)}) == 0
    for stage in ("total", "selection"):
        assert bench_nsa_module.rest_ms(measured | {stage: harness.Measured(None, 0, 0)}) is None


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> bench_nsa_module.Case:
    """One whose passes are never run."""

    def no_part(*_: Any, **__: Any) -> bench_nsa_module.Part:
        return bench_nsa_module.Part(lambda: (), [torch.zeros(1)])

    for name in ("make_module", "dense_part"):
        monkeypatch.setattr(bench_nsa_module, name, no_part)
    monkeypatch.setattr(bench_nsa_module, "module_parts", lambda *_: {"total": no_part(), "rope": no_part()})
    monkeypatch.setattr(bench_nsa_module.Inputs, "draw", lambda _: None)
    return bench_nsa_module.Case(SHAPE, None)  # type: ignore[arg-type]


def test_rows_have_both_times(case: bench_nsa_module.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any, eager: bool = False) -> harness.Measured:
        return harness.Measured(2.0, 0.5, 0.25, 3.0 if eager else None)

    monkeypatch.setattr(harness, "measure_pass", measure)
    total, rope, gates = case.rows("forward", "cuda")
    assert (total["ms"], total["eager_ms"], rope["ms"], gates["ms"]) == (2, 3, 2, 0)
    assert not any(key in row for row in (rope, gates) for key in ("eager_ms", "note"))
    (dense,) = case.rows("forward", "dense")
    assert (dense["ms"], dense["eager_ms"]) == (2, 3) and "note" not in dense


def test_rows_say_that_there_is_no_graph(case: bench_nsa_module.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any, eager: bool = False) -> harness.Measured:
        return harness.Measured(None, 0.5, 0.25, 3.0, "no CUDA graph: why") if eager else harness.Measured(2.0, 0, 0)

    monkeypatch.setattr(harness, "measure_pass", measure)
    total, rope, gates = case.rows("forward", "cuda")
    (dense,) = case.rows("forward", "dense")
    assert all((row["ms"], row["eager_ms"], row["note"]) == (None, 3, "no CUDA graph: why") for row in (total, dense))
    assert rope["ms"] == 2 and gates["ms"] is None and "no time" in gates["note"]
    assert "no CUDA graph: why" in bench_nsa_module.table([total, rope, gates, dense])


def test_rows_say_why_a_pass_does_not_run(case: bench_nsa_module.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cuDNN refuses grouped queries dense attention is tried again; where memory is short nothing is."""
    repeats: list[bool] = []
    error: RuntimeError = RuntimeError("refused\nand more")

    def dense_part(_: Any, repeat: bool) -> bench_nsa_module.Part:
        repeats.append(repeat)
        return bench_nsa_module.Part(lambda: (), [])

    def measure(*_: Any, eager: bool = False) -> harness.Measured:
        if repeats[-1:] == [True]:
            return harness.Measured(2.0, 0, 0, 3.0)
        raise error

    monkeypatch.setattr(bench_nsa_module, "dense_part", dense_part)
    monkeypatch.setattr(harness, "measure_pass", measure)
    (total,) = case.rows("forward", "cuda")
    assert (total["ms"], total["eager_ms"], total["note"]) == (None, None, "RuntimeError: refused")
    (dense,) = case.rows("forward", "dense")
    assert dense["ms"] == 2 and "repeated" in dense["note"] and repeats == [False, True]
    error = torch.OutOfMemoryError("no memory")
    (dense,) = case.rows("forward", "dense")
    assert (dense["ms"], dense["note"]) == (None, "OutOfMemoryError: no memory") and repeats[2:] == [False]


def make_rows() -> list[dict[str, Any]]:
    """Rows as the benchmark makes them: two lengths; dense ran out of memory at the longer one's backward."""
    rows = []
    for shape in (SHAPE, replace(SHAPE, tokens=2048)):
        for name in bench_nsa_module.PASSES:
            rows.append(bench_nsa_module.make_row(shape, name, "cuda", "total", 7.0, 0.5, eager_ms=9.87654))
            rows += [bench_nsa_module.make_row(shape, name, "cuda", stage, 1.0, 0.5) for stage in BRANCHES]
            ms, eager_ms = (None, None) if name == "backward" and shape.tokens == 2048 else (12.34567, 12.5)
            more = {"eager_ms": eager_ms, "note": "a note"}
            rows.append(bench_nsa_module.make_row(shape, name, "dense", "total", ms, None, **more))
    return rows


def test_result_file_and_table(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    harness.write_json(file, HEADER, make_rows())
    rows = harness.read_json(file)["rows"]
    assert [module_shape_of(row).tokens for row in rows] == [300] * 18 + [2048] * 18
    assert module_shape_of(rows[0]) == SHAPE
    lines = bench_nsa_module.table(rows).split("\n")
    assert "300 tokens, 2 x 3 heads, d 32, block 32, top 4, windows 16/8, sliding 40" in lines[2]
    assert "1.8" in lines[2] and "14%" in lines[3] and "a note" in lines[10]
    assert "ms  eager ms  of total" in lines[0]
    assert [line.split()[-6:-4] for line in (lines[2], lines[3])] == [["7.000", "9.877"], ["1.000", "-"]]
    assert "12.350    12.500" in lines[10]


def test_times_that_are_not_of_graphs_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    harness.write_json(file, HEADER, [{k: v for k, v in row.items() if k != "eager_ms"} for row in make_rows()])
    with pytest.raises(ValueError, match="totals must have eager_ms"):
        bench_nsa_module.main(["--plot-only", str(file)])


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "result.json"
    harness.write_json(file, HEADER, make_rows())
    assert bench_nsa_module.main(["--plot-only", str(file)]) == 0
    for name in ("branches", "over_tokens"):
        assert (tmp_path / f"result_{name}.png").stat().st_size > 10_000
    assert bench_nsa_module.LEGEND in capsys.readouterr().out
    assert not plot_branches({**HEADER, "rows": []}, tmp_path / "none.png")
    one_length = [row for row in make_rows() if row["tokens"] == 300]
    assert not plot_tokens({**HEADER, "rows": one_length}, tmp_path / "none.png")
    without_gates = [row | {"ms": None} if row["stage"] == "gates" else row for row in make_rows()]
    assert not plot_branches({**HEADER, "rows": without_gates}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_lines_over_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solid is the time of graphs, dashed in the same colour that of the module launched from Python."""
    axes = pytest.importorskip("matplotlib.axes")
    drawn: dict[str, tuple[Any, ...]] = {}

    def plot(_: Any, tokens: Any, times: Any, style: str, *, label: str, color: str, **__: Any) -> None:
        drawn[label] = (style, color, tokens, times)

    monkeypatch.setattr(axes.Axes, "plot", plot)
    monkeypatch.setattr(axes.Axes, "legend", lambda _: None)
    rows = [row | ({"ms": 12.0} if row["backend"] == "dense" else {}) for row in make_rows()]
    assert plot_tokens({**HEADER, "rows": rows}, tmp_path / "plot.png")
    graph, eager, dense = sorted(drawn, key=lambda label: ("dense" in label, "eager" in label))
    assert "module" in graph and "CUDA graph" in graph and "CUDA graph" in dense and "Python" in eager
    assert all("group 3" in label for label in drawn)
    assert [drawn[label][0] for label in (graph, eager, dense)] == ["-", "--", "-"]
    assert drawn[graph][1] == drawn[eager][1] != drawn[dense][1]
    assert [drawn[label][3][0] for label in (graph, eager, dense)] == pytest.approx([14, 2 * 9.87654, 24])
    assert all(drawn[label][2] == (300, 2048) for label in drawn)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_nsa_module.main(["--dry-run", "--shapes", *MODULE_SHAPES]) == 0
    assert "131072 tokens, 4 x 4 heads, d 128, block 64, top 16, windows 32/16, sliding 512" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_nsa_module.main(["--shapes", "everything"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        bench_nsa_module.main(["--shapes", "quick"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", bench_nsa_module.PASSES)
def test_rows_on_a_gpu(name: str) -> None:
    case = bench_nsa_module.Case(SHAPE, harness.GpuTimer(budget_ms=20))
    rows = [row for backend in ("triton", "dense") for row in case.rows(name, backend)]
    assert all(row["ms"] is not None for row in rows), rows
    assert all(row["eager_ms"] > 0 for row in rows if row["stage"] == "total")
    assert {row["stage"] for row in rows} == {"total", *BRANCHES} - ({"selection"} if name == "backward" else set())


@pytest.mark.gpu
@pytest.mark.parametrize("name", bench_nsa_module.PASSES)
def test_a_graph_is_without_gaps(name: str) -> None:
    """Work that the host enqueues more slowly than the GPU does it, and longer than it runs ahead."""
    x = torch.zeros(1 << 10, device="cuda", requires_grad=True)

    def call() -> tuple[torch.Tensor]:
        y = x
        for _ in range(500):
            y = y * 1.5
        return (y,)

    measured = harness.measure_pass(harness.GpuTimer(budget_ms=20), name, call, [x], eager=True)
    assert not measured.note and measured.ms is not None and measured.eager_ms is not None
    assert 0 < measured.ms < measured.eager_ms


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("name", bench_nsa_module.PASSES)
def test_what_cannot_be_captured(name: str) -> None:
    """No time of a graph, and why; the GPU can be used afterwards."""
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            refuse()
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            refuse()
            return gradient * 2

    def refuse() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph\nand more")

    timer = harness.GpuTimer(budget_ms=20)
    measured = harness.measure_pass(timer, name, lambda: (Refusing.apply(x),), [x], eager=True)
    assert measured.ms is None and measured.note == "no CUDA graph: RuntimeError: not in a graph"
    assert measured.eager_ms is not None and measured.eager_ms > 0
    assert harness.measure_pass(timer, name, lambda: (x * 2,), [x]).ms is not None
