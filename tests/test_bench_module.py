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


def make_rows() -> list[dict[str, Any]]:
    """Rows as the benchmark makes them: two lengths; dense ran out of memory at the longer one's backward."""
    rows = []
    for shape in (SHAPE, replace(SHAPE, tokens=2048)):
        for name in bench_nsa_module.PASSES:
            stages = {"total": 7.0} | dict.fromkeys(BRANCHES, 1.0)
            rows += [bench_nsa_module.make_row(shape, name, "cuda", stage, ms, 0.5) for stage, ms in stages.items()]
            ms = None if name == "backward" and shape.tokens == 2048 else 12.34567
            rows.append(bench_nsa_module.make_row(shape, name, "dense", "total", ms, None, note="a note"))
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


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "result.json"
    harness.write_json(file, HEADER, make_rows())
    assert bench_nsa_module.main(["--plot-only", str(file)]) == 0
    for name in ("branches", "over_tokens"):
        assert (tmp_path / f"result_{name}.png").stat().st_size > 10_000
    assert not plot_branches({**HEADER, "rows": []}, tmp_path / "none.png")
    one_length = [row for row in make_rows() if row["tokens"] == 300]
    assert not plot_tokens({**HEADER, "rows": one_length}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


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
    assert {row["stage"] for row in rows} == {"total", *BRANCHES} - ({"selection"} if name == "backward" else set())
