"""The pictures of the module's benchmark: time by branch as stacked bars, and forward + backward over tokens.

`ms` of a row is the GPU's time, from a CUDA graph; `eager_ms`, of totals, is that of a pass launched from Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .harness import Row
from .shapes import ModuleShape

BRANCHES = (
    "rope", "compression", "compressed_attention", "selection", "selected_attention", "sliding_window", "gates",
)  # fmt: skip
_COLOURS = dict(
    zip(BRANCHES, ("#8c6d46", "#c9a66b", "#1f5c99", "#7fb2dd", "#2a7f3f", "#d98b2b", "#b0b0b0"), strict=True)
)
_BACKEND_COLOURS = {"cuda": "#2a7f3f", "triton": "#7b5ea7", "dense": "#6f6f6f"}
_SIZES = (
    "tokens", "num_kv_heads", "group_size", "head_dim", "block_size", "topk", "kernel_size", "kernel_stride",
    "window_size",
)  # fmt: skip


def module_shape_of(row: Row) -> ModuleShape:
    """The shape that a row was measured for."""
    sizes: dict[str, Any] = {key: int(row[key]) for key in _SIZES}
    return ModuleShape(**sizes, dtype=row["dtype"])


def _pass_of(row: Row) -> tuple[ModuleShape, str, str]:
    return module_shape_of(row), row["backend"], row["pass"]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_branches(result: dict[str, Any], path: Path) -> bool:
    """Draws a panel a pass: for every shape the branches stacked, the total and that of dense attention as numbers.

    All from CUDA graphs. Branches timed alone may add up to more than the total: each of them starts with a cold L2. A
    pass with a part that has no time is left out.

    Returns:
        Whether there was something to draw, into a PNG.
    """
    rows = [row for row in result["rows"] if row["ms"] is not None]
    whole = {_pass_of(row) for row in rows if row["stage"] == "gates"}  # the rest of the total: all else has a time
    branches = [row for row in rows if row["stage"] in BRANCHES and _pass_of(row) in whole]
    if not branches:
        return False
    totals = {_pass_of(row): row["ms"] for row in rows if row["stage"] == "total"}
    passes = list(dict.fromkeys(row["pass"] for row in branches))
    bars = list(dict.fromkeys((module_shape_of(row), row["backend"]) for row in branches))
    bars.sort(key=lambda bar: (bar[0].group_size, bar[0].tokens))
    ms = {(*_pass_of(row), row["stage"]): row["ms"] for row in branches}

    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(passes), figsize=(4 + 5 * len(passes), 2 + 0.6 * len(bars)), sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], passes, strict=True):
        left = [0.0] * len(bars)
        for branch in BRANCHES:
            widths = [ms.get((shape, backend, name, branch), 0.0) for shape, backend in bars]
            axis.barh(range(len(bars)), widths, 0.6, left=left, color=_COLOURS[branch], label=branch.replace("_", " "))
            left = [begin + width for begin, width in zip(left, widths, strict=True)]
        longest = max(left)
        for place, (end, (shape, backend)) in enumerate(zip(left, bars, strict=True)):
            total, beside = (totals.get((shape, who, name)) for who in (backend, "dense"))
            text = (f"{total:.3g}" if total else "") + (f"  (dense {beside:.3g})" if beside else "")
            axis.text(end + 0.01 * longest, place, text, va="center", fontsize=8)
        axis.set(title=name, xlabel="ms of the GPU, from CUDA graphs", xlim=(0, 1.3 * longest))
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
    labels = [
        f"{shape.tokens} tokens,\n{shape.num_kv_heads} x {shape.group_size} heads, {name}" for shape, name in bars
    ]
    axes[0][0].set_yticks(range(len(bars)), labels, fontsize=8)
    axes[0][0].set_ylim(len(bars) - 0.4, -0.6)  # the first shape on top
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=8)
    figure.suptitle(f"NSA module from q, k, v to gated output on {result['gpu']}", x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0.06, 1, 0.98))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def plot_tokens(result: dict[str, Any], path: Path) -> bool:
    """Draws forward + backward over the number of tokens, for each group size measured at several; a colour a backend.

    Solid lines are the GPU's time, from CUDA graphs; dashed ones the module's launched from Python.

    Returns:
        Whether some line had two points, so that a PNG was drawn.
    """
    times: dict[tuple[int, str, str], dict[int, dict[str, float]]] = {}  # (group, backend, key) -> tokens -> pass -> ms
    for row in result["rows"]:
        for key in ("ms",) if row["backend"] == "dense" else ("ms", "eager_ms"):
            if row["stage"] == "total" and row[key] is not None:
                by_tokens = times.setdefault((row["group_size"], row["backend"], key), {})
                by_tokens.setdefault(row["tokens"], {})[row["pass"]] = row[key]
    lines = {
        of: sorted((tokens, sum(passes.values())) for tokens, passes in by_tokens.items() if len(passes) == 2)
        for of, by_tokens in times.items()
    }
    lines = {of: line for of, line in lines.items() if len(line) > 1}
    if not lines:
        return False
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for (group, backend, key), line in lines.items():
        who = "dense, cuDNN" if backend == "dense" else f"module, {backend}"
        style, how = ("-", "GPU, from a CUDA graph") if key == "ms" else ("--", "eager, launched from Python")
        label = f"{who}, group {group}: {how}"
        axis.plot(*zip(*line, strict=True), style, marker="o", color=_BACKEND_COLOURS[backend], label=label)
    ticks = sorted({tokens for line in lines.values() for tokens, _ in line})
    axis.set(xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="forward + backward, ms")
    axis.set_xticks(ticks, [f"{tokens // 1024}K" for tokens in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend()
    axis.set_title(f"NSA module and dense attention on {result['gpu']}", loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
