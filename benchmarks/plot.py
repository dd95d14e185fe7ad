"""The picture of a result file: one bar a shape and backend, time on a logarithmic scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .harness import Row
from .shapes import Shape

_COLOURS = {"cuda": "#2a7f3f", "triton": "#7b5ea7", "dense": "#9a9a9a"}
_LABELS = {"cuda": "selected, CUDA", "triton": "selected, Triton", "dense": "dense causal, cuDNN"}


def shape_of(row: Row) -> Shape:
    """The shape that a row was measured for."""
    sizes = {key: int(row[key]) for key in ("tokens", "num_kv_heads", "group_size", "block_size", "topk", "head_dim")}
    return Shape(**sizes, selection=row["selection"], dtype=row["dtype"])


def plot_results(result: dict[str, Any], path: Path) -> None:
    """Draws a panel a pass: total times of every backend as bars, the bound as a tick. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    totals = [row for row in result["rows"] if row["stage"] == "total" and row["ms"] is not None]
    passes = list(dict.fromkeys(row["pass"] for row in totals))
    shapes = list(dict.fromkeys(shape_of(row) for row in totals))
    if not totals:
        raise ValueError("nothing to plot: the result has no total with a time")
    backends = [name for name in _COLOURS if any(row["backend"] == name for row in totals)]
    thickness = 0.8 / max(1, len(backends))

    figure, axes = pyplot.subplots(
        1, len(passes), figsize=(4 + 5 * len(passes), 1.6 + 0.6 * len(shapes)), sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], passes, strict=True):
        ms = {(shape_of(row), row["backend"]): row["ms"] for row in totals if row["pass"] == name}
        for number, backend in enumerate(backends):
            found = [(i, ms[shape, backend]) for i, shape in enumerate(shapes) if (shape, backend) in ms]
            places = [i - 0.4 + (number + 0.5) * thickness for i, _ in found]
            bars = axis.barh(
                places, [time for _, time in found], thickness, color=_COLOURS[backend], label=_LABELS[backend]
            )
            axis.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=7)
        bounds = [(i, ms[shape, "bound"]) for i, shape in enumerate(shapes) if (shape, "bound") in ms]
        if bounds:
            at, time = zip(*bounds, strict=True)
            low, high = [i - 0.45 for i in at], [i + 0.45 for i in at]
            axis.vlines(time, low, high, color="#c0392b", linewidth=2, label="bound")
        axis.set_xscale("log")
        axis.set_xlabel("ms (logarithmic)")
        axis.set_title(name)
        axis.grid(axis="x", which="both", alpha=0.25)
        axis.margins(x=0.15)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(
        range(len(shapes)), [str(shape).replace(", block", "\nblock") for shape in shapes], fontsize=8
    )
    axes[0][0].set_ylim(len(shapes) - 0.4, -0.6)  # the first shape on top
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), fontsize=8)
    figure.suptitle(f"Selected attention on {result['gpu']}", x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
