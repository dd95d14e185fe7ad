"""Times the NSA module from q, k and v to its gated output, by branch, beside dense causal attention of cuDNN.

    python -m benchmarks.bench_nsa_module                      # groups 1, 4 and 16 at 65,536 tokens; 8K to 128K tokens
    python -m benchmarks.bench_nsa_module --shapes quick       # one shape
    python -m benchmarks.bench_nsa_module --plot-only FILE     # draw a result file again, without a GPU

The total of a pass is everything between the projections: RoPE, compression and the gates too. Each branch is also
timed alone, on the tensors it has in the module; "gates" is the rest of the total: the gated sum, and in the backward
the sums of gradients that come from several branches. Dense attention is timed without RoPE. Writes a JSON file and
plots, prints a table.

There are two times, of the module and of dense attention alike:

    ms         what the GPU takes, from a CUDA graph
    eager ms   launched op by op from Python, totals only; below about 16,384 tokens the module's waits for the host

In a model the host runs ahead while the GPU does projections and MLPs, and the module can be captured in a graph.
Here, a pass that cannot be captured has no ms, and a note says why.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

import fsa
from fsa.module.compressed_attention import compressed_attention
from fsa.module.compression import find_windows
from fsa.module.rope import rotate
from fsa.module.selection import select_blocks
from fsa.module.sliding_window import sliding_window_attention

from . import harness
from .harness import GpuTimer, Row
from .plot_module import module_shape_of, plot_branches, plot_tokens
from .shapes import MODULE_SHAPES, ModuleShape

PASSES = ("forward", "backward")
LEGEND = (
    "ms: what the GPU takes, from a CUDA graph; of total and x dense are of this time\n"
    "eager ms: launched op by op from Python, which below about 16,384 tokens waits for the host"
)
BACKENDS = ("cuda", "triton", "dense")

_BUDGET_MS = 500.0  # of a measurement


def make_row(
    shape: ModuleShape, name: str, backend: str, stage: str, ms: float | None, extra_gib: float | None, **more: Any
) -> Row:
    """A row of the result file, as of `harness.make_row`; a total has eager_ms besides."""
    more = {key: getattr(shape, key) for key in ("kernel_size", "kernel_stride", "window_size")} | more
    return harness.make_row("nsa_module", shape, name, backend, stage, ms, extra_gib, **more)


def make_module(shape: ModuleShape, backend: str, device: str = "cuda") -> fsa.FlashSparseAttention:
    """The module of a shape; its projections, which are not timed, are small."""
    return fsa.FlashSparseAttention(
        hidden_size=shape.head_dim,
        num_q_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        kernel_size=shape.kernel_size,
        kernel_stride=shape.kernel_stride,
        block_size=shape.block_size,
        topk=shape.topk,
        init_blocks=1,
        local_blocks=2,
        window_size=shape.window_size,
        rope_config=fsa.RopeConfig(head_dim=shape.head_dim),
        backend=backend,
    ).to(device, shape.torch_dtype)


class Part(NamedTuple):
    """A piece of work: what it computes, and the tensors that gradients flow to (none: it has no backward)."""

    call: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]


class Inputs(NamedTuple):
    """What the module attends with, before RoPE; all require gradients."""

    q: Tensor  # [tokens, num_heads, head_dim]
    k: Tensor  # [tokens, num_kv_heads, head_dim]
    v: Tensor  # [tokens, num_kv_heads, head_dim]
    gates: Tensor  # [tokens, 3]

    @classmethod
    def draw(cls, shape: ModuleShape, device: str = "cuda") -> Inputs:
        """Random ones."""
        generator = torch.Generator(device).manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(shape.tokens, *size, generator=generator, device=device, dtype=shape.torch_dtype)

        heads = (draw(heads, shape.head_dim) for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads))
        return cls(*(x.requires_grad_() for x in (*heads, draw(3).sigmoid())))


def module_parts(module: fsa.FlashSparseAttention, inputs: Inputs) -> dict[str, Part]:
    """The total and the branches of the module, on one sequence."""
    total = len(inputs.q)
    cu_seqlens = torch.tensor([0, total], dtype=torch.int32, device=inputs.q.device)
    sizes: dict[str, Any] = {"kernel_size": module.kernel_size, "kernel_stride": module.kernel_stride}
    backend = "auto" if module.backend == "cuda" else module.backend
    windows = find_windows(cu_seqlens, total, **sizes)
    compression = [module.compress_key, module.compress_value, module.intra_block_pe]

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    def compress() -> Sequence[Tensor]:
        return module.compress(inputs.k, inputs.v, find_windows(cu_seqlens, total, **sizes))

    with torch.no_grad():
        raw_k, compressed_v = map(leaf, compress())

    def rope() -> Sequence[Tensor]:
        cosine, sine = module.rope(windows.positions, inputs.q.dtype)
        tables = cosine[:total], sine[:total]
        rotated_windows = rotate(raw_k, cosine[total:], sine[total:])
        return rotate(inputs.q, *tables), rotate(inputs.k, *tables), rotated_windows

    with torch.no_grad():
        q, k, compressed_k = map(leaf, rope())
    v, sequences = inputs.v, (cu_seqlens, windows.cu_seqlens)

    def attend_compressed() -> tuple[Tensor, Tensor]:
        return compressed_attention(q, compressed_k, compressed_v, *sequences, **sizes, backend=backend)

    with torch.no_grad():
        lse = attend_compressed()[1]

    def select() -> Sequence[Tensor]:
        topk_idx = select_blocks(
            q, compressed_k, lse, *sequences, **sizes, block_size=module.block_size, topk=module.topk,
            init_blocks=module.init_blocks, local_blocks=module.local_blocks, backend=backend,
        )  # fmt: skip
        return (topk_idx,)

    topk_idx = select()[0]

    def attend_selected() -> Sequence[Tensor]:
        size = module.block_size
        return (fsa.selected_attention(q, k, v, topk_idx, cu_seqlens, block_size=size, backend=module.backend),)

    def slide() -> Sequence[Tensor]:
        return (sliding_window_attention(q, k, v, cu_seqlens, window_size=module.window_size),)

    return {
        "total": Part(lambda: (module.attend(*inputs, cu_seqlens),), [*inputs, *compression]),
        "compression": Part(compress, [inputs.k, inputs.v, *compression]),
        "rope": Part(rope, [inputs.q, inputs.k, raw_k]),
        "compressed_attention": Part(lambda: attend_compressed()[:1], [q, compressed_k, compressed_v]),
        "selection": Part(select, []),
        "selected_attention": Part(attend_selected, [q, k, v]),
        "sliding_window": Part(slide, [q, k, v]),
    }


def dense_part(inputs: Inputs, repeat: bool) -> Part:
    """Causal attention over all keys; `repeat`: K and V written out for every query head."""
    q, k, v = (x.detach().transpose(0, 1)[None].contiguous() for x in inputs[:3])
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend() -> Sequence[Tensor]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return (scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]),)

    return Part(attend, leaves)


class Case:
    """One shape on the GPU: its inputs, and the rows of every pass and backend."""

    def __init__(self, shape: ModuleShape, timer: GpuTimer) -> None:
        """Draws the inputs."""
        self.shape, self._timer = shape, timer
        self._inputs = Inputs.draw(shape)

    def rows(self, name: str, backend: str) -> list[Row]:
        """The rows of a pass on a backend, the total first; where it cannot run, a row without a time says why."""
        try:
            return self._dense_rows(name) if backend == "dense" else self._module_rows(name, backend)
        except RuntimeError as error:  # out of memory is one
            note = harness.brief(error)
            return [make_row(self.shape, name, backend, "total", None, None, eager_ms=None, note=note)]

    def _module_rows(self, name: str, backend: str) -> list[Row]:
        torch.manual_seed(0)
        parts = module_parts(make_module(self.shape, backend), self._inputs)
        if name == "backward":
            parts = {stage: part for stage, part in parts.items() if part.leaves}
        measured = {
            stage: harness.measure_pass(self._timer, name, *part, eager=stage == "total")
            for stage, part in parts.items()
        }
        rest = rest_ms(measured)
        more = {"note": "the total or a branch has no time"} if rest is None else {}
        return [
            *(self._row(name, backend, stage, x) for stage, x in measured.items()),
            make_row(self.shape, name, backend, "gates", rest, None, **more),
        ]

    def _dense_rows(self, name: str) -> list[Row]:
        """Where cuDNN refuses grouped queries, K and V are repeated beforehand."""
        try:
            return [self._row(name, "dense", "total", self._measure_dense(name, repeat=False))]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if self.shape.group_size == 1:
                raise
        x = self._measure_dense(name, repeat=True)
        return [self._row(name, "dense", "total", x, "K and V repeated for every query head")]

    def _measure_dense(self, name: str, repeat: bool) -> harness.Measured:
        return harness.measure_pass(self._timer, name, *dense_part(self._inputs, repeat), eager=True)

    def _row(self, name: str, backend: str, stage: str, x: harness.Measured, note: str = "") -> Row:
        more: Row = {"eager_ms": x.eager_ms} if stage == "total" else {}
        if notes := [text for text in (x.note, note) if text]:
            more["note"] = "; ".join(notes)
        return make_row(self.shape, name, backend, stage, x.ms, x.extra_gib, saved_gib=x.saved_gib, **more)


def rest_ms(measured: dict[str, harness.Measured]) -> float | None:
    """What the total took beyond its branches; 0 where they take longer alone than within it, None if one failed."""
    total, times = measured["total"].ms, [x.ms for x in measured.values() if x.ms is not None]
    return None if total is None or len(times) < len(measured) else max(0.0, 2 * total - sum(times))


def table(rows: Sequence[Row]) -> str:
    """The rows for the terminal; a shape and a pass are named once. `LEGEND` says what the times are."""
    totals = {(module_shape_of(row), row["pass"], row["backend"]): row["ms"] for row in rows if row["stage"] == "total"}

    def cells(row: Row) -> list[str]:
        shape, is_total = module_shape_of(row), row["stage"] == "total"
        dense, total = (totals.get((shape, row["pass"], backend)) for backend in ("dense", row["backend"]))
        is_ours = is_total and row["backend"] != "dense"
        return [
            str(shape),
            row["pass"],
            row["backend"],
            row["stage"] if is_total else f"· {row['stage']}",
            _number(row["ms"], ".3f"),
            _number(row.get("eager_ms"), ".3f"),
            _number(row["ms"] / total if row["ms"] is not None and total else None, ".0%"),
            _number(dense / row["ms"] if is_ours and dense and row["ms"] else None, ".1f"),
            _number(row["extra_gib"], ".2f"),
            _number(row.get("saved_gib") if row["pass"] == "backward" else None, ".2f"),
            row.get("note", "")[:60],
        ]

    columns = [
        "shape", "pass", "backend", "stage", "ms", "eager ms", "of total", "x dense", "extra GiB", "saved GiB", "note",
    ]  # fmt: skip
    lines = [cells(row) for row in rows]
    for above, line in reversed(list(itertools.pairwise(lines))):
        named = 2 if above[:2] == line[:2] else 1 if above[0] == line[0] else 0
        line[:named] = [""] * named
    return harness.format_table(columns, lines)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def measure(shapes: Sequence[ModuleShape], passes: Sequence[str], rivals: Sequence[str]) -> list[Row]:
    """All rows, with a progress bar."""
    timer = GpuTimer(_BUDGET_MS)
    rows: list[Row] = []
    with tqdm(total=len(shapes) * len(passes) * len(rivals), unit="pass", dynamic_ncols=True) as progress:
        for shape in shapes:
            case = Case(shape, timer)
            for name, backend in itertools.product(passes, rivals):
                progress.set_description(f"{shape}, {name}, {backend}")
                rows += case.rows(name, backend)
                progress.update()
            del case
            torch.cuda.empty_cache()
    return rows


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    lists = ", ".join(f"{name} ({len(shapes)})" for name, shapes in MODULE_SHAPES.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(MODULE_SHAPES), default=["groups", "tokens"], help=f"lists: {lists}")
    add("--backends", nargs="+", choices=BACKENDS, default=["cuda", "dense"], help="of selected attention, and dense")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    add("--out", type=Path, default=harness.RESULTS, metavar="FOLDER", help="of the JSON file and the plots")
    add("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    add("--plot-only", type=Path, metavar="FILE", help="draw the plots of a JSON file beside it, print its table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 if the module failed."""
    options = parse_arguments(arguments)
    if options.plot_only:
        _report(options.plot_only)
        return 0
    shapes = list(dict.fromkeys(shape for name in options.shapes for shape in MODULE_SHAPES[name]))
    if options.dry_run:
        print(*shapes, sep="\n")
        print(f"{len(shapes)} shapes: {', '.join(options.passes)} on {', '.join(options.backends)}")
        return 0

    harness.require_gpu()
    if "cuda" in options.backends and (stale := harness.stale_extension()):
        sys.exit(stale)
    header = harness.environment()
    rows = measure(shapes, options.passes, options.backends)
    file = options.out / f"nsa_module_{'_'.join(options.shapes)}.json"
    harness.write_json(file, header, rows)
    _report(file)
    failed = [row for row in rows if row["ms"] is None and row["backend"] != "dense"]
    for row in failed:
        what = f"{module_shape_of(row)}, {row['pass']}, {row['backend']}, {row['stage']}"
        print(f"failed: {what}: {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def read_result(file: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: it is not one, or its times are not of CUDA graphs.
    """
    result = harness.read_json(file)
    if any(row["stage"] == "total" and "eager_ms" not in row for row in result["rows"]):
        raise ValueError(f"{file}: totals must have eager_ms, or ms is not of CUDA graphs; run the benchmark again")
    return result


def _report(file: Path) -> None:
    """Prints the table of a result file and draws its plots beside it."""
    result = read_result(file)
    print(table(result["rows"]), LEGEND, f"rows: {file}", sep="\n")
    for name, plot in (("branches", plot_branches), ("over_tokens", plot_tokens)):
        path = file.with_name(f"{file.stem}_{name}.png")
        if plot(result, path):
            print(f"plot: {path}")


if __name__ == "__main__":
    sys.exit(main())
