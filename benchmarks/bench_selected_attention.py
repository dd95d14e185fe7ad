"""Times selected attention, forward and backward: CUDA, Triton, dense causal attention of cuDNN, and the bound.

    python -m benchmarks.bench_selected_attention                      # some minutes; a time budget a row
    python -m benchmarks.bench_selected_attention --shapes quick       # fewer shapes
    python -m benchmarks.bench_selected_attention --plot-only FILE     # draw a result file again, without a GPU

The total of a pass is everything that a call does, the plan included; with --stages each stage is a row besides.
Writes a JSON file and a plot, prints a table. Errors are relative to float64, over sampled tokens and blocks.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

import fsa
from fsa import backends, pipeline
from fsa.problem import Problem

from . import exact, harness
from .bound import Bound, backward_bound, count_work, forward_bound
from .harness import GpuTimer, Row
from .plot import plot_results, shape_of
from .selections import make_topk_idx
from .shapes import SHAPES, Shape

PASSES = ("forward", "backward")
BACKENDS = ("cuda", "triton", "dense", "bound")
STAGES = ("plan", "forward_main", "forward_reduce", "backward_preprocess", "backward_main", "backward_reduce")
SHARED_STAGES = ("forward_split", "forward_shared")  # of backends that share blocks

_SAMPLED_TOKENS = 256
_SAMPLED_BLOCKS = ((0, 0.5), (-1, 0.75))  # (KV head, place of the block in the sequence)

Attend = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


class Samples:
    """float64 results of a shape's inputs where errors are measured."""

    def __init__(self, inputs: exact.Inputs) -> None:
        """Computes them."""
        tokens, kv_heads, _ = inputs.k.shape
        self._inputs = inputs
        self._tokens = torch.linspace(0, tokens - 1, _SAMPLED_TOKENS, device=inputs.q.device).long()
        self._rows = [exact.query_rows(inputs, head, self._tokens) for head in range(kv_heads)]
        num_blocks = tokens // inputs.block_size
        self._blocks = [(range(kv_heads)[head], int(place * num_blocks)) for head, place in _SAMPLED_BLOCKS]
        self._gradients = [exact.block_gradients(inputs, head, block) for head, block in self._blocks]

    def forward_errors(self, out: Tensor, _lse: Tensor) -> dict[str, float]:
        """Relative error of out over the sampled tokens."""
        rows = torch.cat([rows.out for rows in self._rows], dim=1)
        return {"err_out": exact.relative_error(out[self._tokens], rows)}

    def backward_errors(self, dq: Tensor, dk: Tensor, dv: Tensor) -> dict[str, float]:
        """Relative errors of dq over the sampled tokens, of dk and dv over the sampled blocks."""
        rows = torch.cat([rows.dq for rows in self._rows], dim=1)
        size = self._inputs.block_size
        at = [(slice(block * size, (block + 1) * size), head) for head, block in self._blocks]
        return {
            "err_dq": exact.relative_error(dq[self._tokens], rows),
            "err_dk": exact.relative_error(
                torch.stack([dk[i] for i in at]), torch.stack([g for g, _ in self._gradients])
            ),
            "err_dv": exact.relative_error(
                torch.stack([dv[i] for i in at]), torch.stack([g for _, g in self._gradients])
            ),
        }


make_row = functools.partial(harness.make_row, "selected_attention")


class Measured(NamedTuple):
    """What a pass took, and what it returned."""

    ms: float
    extra_gib: float
    results: Sequence[Tensor]


class Case:
    """One shape on the GPU: its inputs, and a row for every pass and backend."""

    def __init__(self, shape: Shape, timer: GpuTimer, with_stages: bool) -> None:
        """Draws the inputs."""
        self.shape, self._timer, self._with_stages = shape, timer, with_stages
        generator = torch.Generator("cuda").manual_seed(1)

        def draw(heads: int) -> Tensor:
            size = (shape.tokens, heads, shape.head_dim)
            return torch.randn(size, generator=generator, device="cuda", dtype=shape.torch_dtype)

        topk_idx = make_topk_idx(shape.selection, shape.tokens, shape.num_kv_heads, shape.topk, shape.block_size)
        self._inputs = exact.Inputs(
            q=draw(shape.num_heads),
            k=draw(shape.num_kv_heads),
            v=draw(shape.num_kv_heads),
            dout=draw(shape.num_heads),
            topk_idx=topk_idx,
            block_size=shape.block_size,
        )
        self._cu_seqlens = torch.tensor([0, shape.tokens], dtype=torch.int32, device="cuda")
        work = count_work(topk_idx, shape.block_size)
        self._bounds = {"forward": forward_bound(shape, work), "backward": backward_bound(shape, work)}
        self._samples: Samples | None = None

    def rows(self, name: str, backend: str) -> list[Row]:
        """The rows of a pass on a backend, the total first; where it cannot run, a row without a time says why."""
        if backend == "bound":
            return self._bound_rows(name, self._bounds[name])
        try:
            return self._dense_rows(name) if backend == "dense" else self._selected_rows(name, backend)
        except RuntimeError as error:  # out of memory is one
            reason = str(error).strip().split("\n")[0]
            return [make_row(self.shape, name, backend, "total", None, None, note=f"{type(error).__name__}: {reason}")]

    def _bound_rows(self, name: str, bound: Bound) -> list[Row]:
        terms = {"products": bound.products, "memory": bound.memory, "gather": bound.gather}
        return [
            make_row(self.shape, name, "bound", "total", bound.ms, None),
            *(make_row(self.shape, name, "bound", stage, ms, None) for stage, ms in terms.items()),
        ]

    def _measure(self, name: str, attend: Attend, tensors: Sequence[Tensor], dout: Tensor) -> Measured:
        """Time and memory of a pass of `attend`; the backward alone, its forward done before."""
        if name == "forward":

            def call() -> Sequence[Tensor]:
                with torch.no_grad():
                    return attend(*tensors)

        else:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            out = attend(*leaves)[0]

            def call() -> Sequence[Tensor]:
                return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        results = call()  # compiles, and loads kernels, whose memory is not the call's
        gib = harness.extra_gib(call)
        return Measured(self._timer.ms(call), gib, results)

    def _selected_rows(self, name: str, backend: str) -> list[Row]:
        x = self._inputs

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            return fsa.selected_attention(
                q, k, v, x.topk_idx, self._cu_seqlens, block_size=x.block_size, return_lse=True, backend=backend
            )

        measured = self._measure(name, attend, (x.q, x.k, x.v), x.dout)
        if self._samples is None:
            self._samples = Samples(x)
        errors_of = self._samples.forward_errors if name == "forward" else self._samples.backward_errors
        bound = self._bounds[name]
        total = make_row(
            self.shape,
            name,
            backend,
            "total",
            measured.ms,
            measured.extra_gib,
            share_of_bound=bound.ms / measured.ms,
            tflops=bound.flops / measured.ms / 1e9,
            **errors_of(*measured.results),
        )
        return [total, *(self._stage_rows(name, backend) if self._with_stages else [])]

    def _stage_rows(self, name: str, backend: str) -> list[Row]:
        """Each stage by itself, timed inside whole calls; what the total has besides is allocation and zeroing."""
        recorder = harness.SpanRecorder()
        stages = _timed_stages(backends.stages(backend), recorder)
        problem = self._problem()
        out, lse = pipeline.forward(problem, stages)

        def call() -> Sequence[harness.Span]:
            recorder.take()
            if name == "forward":
                pipeline.forward(problem, stages)
            else:
                pipeline.backward(problem, stages, out, lse, self._inputs.dout, None)
            return recorder.take()

        return [
            make_row(self.shape, name, backend, stage, ms, None) for stage, ms in self._timer.spans_ms(call).items()
        ]

    def _problem(self) -> Problem:
        x = self._inputs
        scale = self.shape.head_dim**-0.5
        return Problem(x.q, x.k, x.v, x.topk_idx, self._cu_seqlens, self._cu_seqlens, x.block_size, scale, causal=True)

    def _dense_rows(self, name: str) -> list[Row]:
        """Causal attention over all keys. Where cuDNN refuses grouped queries, K and V are repeated beforehand."""
        q, k, v, dout = (tensor.transpose(0, 1)[None].contiguous() for tensor in self._tensors())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return (scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]),)

        try:
            measured = self._measure(name, attend, (q, k, v), dout)
            more = {}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if self.shape.group_size == 1:
                raise
            k, v = (tensor.repeat_interleave(self.shape.group_size, dim=1) for tensor in (k, v))
            measured = self._measure(name, attend, (q, k, v), dout)
            more = {"note": "K and V repeated for every query head"}
        return [make_row(self.shape, name, "dense", "total", measured.ms, measured.extra_gib, **more)]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self._inputs
        return x.q, x.k, x.v, x.dout


def _timed_stages(stages: ModuleType, recorder: harness.SpanRecorder) -> ModuleType:
    timed = ModuleType("timed_stages")
    timed.shares_blocks = stages.shares_blocks  # type: ignore[attr-defined]
    for function in STAGES + (SHARED_STAGES if hasattr(stages, "forward_shared") else ()):
        stage = function.removeprefix("forward_").removeprefix("backward_")
        setattr(timed, function, recorder.wrap(stage, getattr(stages, function)))
    return timed


def table(rows: Sequence[Row]) -> str:
    """The rows for the terminal; a shape and a pass are named once."""
    dense = {(shape_of(row), row["pass"]): row["ms"] for row in rows if row["backend"] == "dense"}

    def cells(row: Row) -> list[str]:
        is_total = row["stage"] == "total"
        dense_ms = dense.get((shape_of(row), row["pass"]))
        is_ours = is_total and row["backend"] in ("cuda", "triton")
        speedup = dense_ms / row["ms"] if is_ours and dense_ms and row["ms"] else None
        errors = [value for key, value in row.items() if key.startswith("err_")]
        return [
            str(shape_of(row)),
            row["pass"],
            row["backend"],
            row["stage"] if is_total else f"· {row['stage']}",
            _number(row["ms"], ".3f"),
            _number(row.get("share_of_bound"), ".0%"),
            _number(speedup, ".1f"),
            _number(row["extra_gib"], ".2f"),
            _number(max(errors, default=None), ".5f"),
            row.get("note", "")[:60],
        ]

    columns = ["shape", "pass", "backend", "stage", "ms", "of bound", "x dense", "extra GiB", "error", "note"]
    lines = [cells(row) for row in rows]
    for above, line in reversed(list(itertools.pairwise(lines))):
        named = 2 if above[:2] == line[:2] else 1 if above[0] == line[0] else 0
        line[:named] = [""] * named
    return harness.format_table(columns, lines)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {', '.join(unknown)}")
        return names

    return parse


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    lists = ", ".join(f"{name} ({len(shapes)})" for name, shapes in SHAPES.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--shapes", type=_names(list(SHAPES)), default=["targets"], metavar="LISTS", help=f"of {lists}; default targets"
    )
    add("--backends", type=_names(BACKENDS), default=list(BACKENDS), metavar="NAMES", help=f"of {', '.join(BACKENDS)}")
    add("--passes", type=_names(PASSES), default=list(PASSES), metavar="NAMES", help=f"of {', '.join(PASSES)}")
    add("--stages", action=argparse.BooleanOptionalAction, default=True, help="a row for each stage of CUDA and Triton")
    add("--out", type=Path, default=harness.RESULTS, metavar="FOLDER", help="of the JSON file and the plot")
    add("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    add("--plot-only", type=Path, metavar="FILE", help="draw the plot of a JSON file beside it, print its table")
    return parser.parse_args(arguments)


def measure(shapes: Sequence[Shape], passes: Sequence[str], rivals: Sequence[str], with_stages: bool) -> list[Row]:
    """All rows, with a progress bar."""
    timer = GpuTimer()
    rows: list[Row] = []
    with tqdm(total=len(shapes) * len(passes) * len(rivals), unit="row", dynamic_ncols=True) as progress:
        for shape in shapes:
            case = Case(shape, timer, with_stages)
            for name in passes:
                for backend in rivals:
                    progress.set_description(f"{shape}, {name}, {backend}")
                    rows += case.rows(name, backend)
                    progress.update()
            del case
            torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 if one of our own backends failed."""
    options = parse_arguments(arguments)
    if options.plot_only:
        result = harness.read_json(options.plot_only)
        print(table(result["rows"]))
        _plot(result, options.plot_only.with_suffix(".png"))
        return 0
    shapes = list(dict.fromkeys(shape for name in options.shapes for shape in SHAPES[name]))
    if options.dry_run:
        print(*shapes, sep="\n")
        print(f"{len(shapes)} shapes: {', '.join(options.passes)} on {', '.join(options.backends)}")
        return 0

    harness.require_gpu()
    if "cuda" in options.backends and (stale := harness.stale_extension()):
        sys.exit(stale)
    header = harness.environment()
    rows = measure(shapes, options.passes, options.backends, options.stages)
    file = options.out / f"selected_attention_{'_'.join(options.shapes)}.json"
    harness.write_json(file, header, rows)
    print(table(rows))
    print(f"rows: {file}")
    _plot(harness.read_json(file), file.with_suffix(".png"))
    failed = [row for row in rows if row["ms"] is None and row["backend"] in ("cuda", "triton")]
    for row in failed:
        print(f"failed: {shape_of(row)}, {row['pass']}, {row['backend']}: {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def _plot(result: dict[str, Any], path: Path) -> None:
    plot_results(result, path)
    print(f"plot: {path}")


if __name__ == "__main__":
    sys.exit(main())
