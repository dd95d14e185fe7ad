"""Times and measures GPU work, and writes it down: events, CUDA graphs, peak memory, the environment, JSON, a table."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
Span = tuple[str, torch.cuda.Event, torch.cuda.Event]  # name, start, end

# Keys of every row; a kind of row adds what it needs besides.
ROW_KEYS = (
    "bench", "pass", "stage", "backend", "selection", "tokens", "num_kv_heads", "group_size", "head_dim", "block_size",
    "topk", "dtype", "ms", "extra_gib",
)  # fmt: skip
HEADER_KEYS = ("gpu", "driver", "cuda", "torch", "triton", "date", "csrc_sha256", "rows")

_FLUSH_BYTES = 256 << 20  # several times the largest L2
_LEAD_CYCLES = 1_000_000  # about half a millisecond, in which the host runs ahead of the GPU
_WARM_UP_CALLS = 2
_MIN_REPEATS, _MAX_REPEATS = 10, 30


class GpuTimer:
    """Median times between CUDA events, with a cold L2 and without launch latency.

    Before each repetition, outside the timed region, a write of 256 MB takes everything else out of L2 and a short spin
    keeps the GPU busy while the host enqueues the repetition, as it is in the middle of a training step. The host
    waits for the GPU only after the last repetition. Work that takes the host longer to enqueue than the GPU to do, and
    than the spin of half a millisecond, is timed with the gaps that this leaves: `graph_ms` is without them.
    """

    def __init__(self, budget_ms: float = 1000.0) -> None:
        """budget_ms: about how long the repetitions of one measurement may take; there are at least 10 of them."""
        self._budget_ms = budget_ms
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def ms(self, call: Callable[[], object]) -> float:
        """Median time of a call."""
        return self.spans_ms(lambda: [_span("call", call)])["call"]

    def spans_ms(self, call: Callable[[], Sequence[Span]]) -> dict[str, float]:
        """Median time of each span that a call records and returns; spans of one name within a call add up."""
        for _ in range(_WARM_UP_CALLS):
            spans = self._prepared(call)
        torch.cuda.synchronize()
        estimate = sum(start.elapsed_time(end) for _, start, end in spans)
        repeats = int(min(max(self._budget_ms / max(estimate, 1e-3), _MIN_REPEATS), _MAX_REPEATS))

        recorded = [self._prepared(call) for _ in range(repeats)]
        torch.cuda.synchronize()
        times: dict[str, list[float]] = {name: [0.0] * repeats for name, _, _ in recorded[0]}
        for repeat, spans in enumerate(recorded):
            for name, start, end in spans:
                times[name][repeat] += start.elapsed_time(end)
        return {name: statistics.median(ms) for name, ms in times.items()}

    def _prepared(self, call: Callable[[], Sequence[Span]]) -> Sequence[Span]:
        self._flush.zero_()
        torch.cuda._sleep(_LEAD_CYCLES)
        return call()


def _span(name: str, call: Callable[[], object]) -> Span:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    return name, start, end


class SpanRecorder:
    """Wraps functions so that each call leaves a span, without waiting for the GPU."""

    def __init__(self) -> None:
        """Starts without spans."""
        self._spans: list[Span] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a span of that name around each call."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            result: list[Any] = []
            self._spans.append(_span(name, lambda: result.append(function(*args, **kwargs))))
            return result[0]

        return timed

    def take(self) -> list[Span]:
        """The spans since the last take."""
        spans, self._spans = self._spans, []
        return spans


def extra_gib(call: Callable[[], Tensor | Sequence[Tensor]]) -> float:
    """Peak memory of a call beyond what was there before and the tensors that it returns, in GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return max(0, torch.cuda.max_memory_allocated() - before - _storage_bytes(tensors)) / 2**30


def saved_gib(call: Callable[[], Sequence[Tensor]]) -> float:
    """What a call keeps for its backward, outputs not counted, in GiB."""
    call()  # compiles, and loads kernels, whose memory is not the call's
    before = torch.cuda.memory_allocated()
    outputs = call()
    return max(0, torch.cuda.memory_allocated() - before - _storage_bytes(outputs)) / 2**30


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def graph_ms(timer: GpuTimer, prepare: Callable[[], Callable[[], object]]) -> float:
    """Median time of a call replayed as a CUDA graph: what the GPU takes, however slow the host is.

    Args:
        timer: measures the replays.
        prepare: returns the call; both run on a stream of their own, since a backward runs where its forward did.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call = prepare()
        for _ in range(_WARM_UP_CALLS):
            call()
        with torch.cuda.graph(graph, stream=side):  # waits for what was enqueued before
            call()
    ms = timer.ms(graph.replay)
    graph.reset()
    return ms


class Measured(NamedTuple):
    """What a pass took."""

    ms: float | None  # of the GPU, from a CUDA graph; None: there is no graph, and `note` says why
    extra_gib: float
    saved_gib: float  # of a backward: what its forward kept for it, beside inputs and outputs
    eager_ms: float | None = None  # launched from Python, op by op; None: not measured
    note: str = ""


def measure_pass(
    timer: GpuTimer,
    name: str,
    call: Callable[[], Sequence[Tensor]],
    leaves: Sequence[Tensor],
    *,
    eager: bool = False,
) -> Measured:
    """Time and memory of a pass of `call`, "forward" or "backward"; the backward alone, its forward done before.

    Memory is that of calls launched from Python: a graph holds its own.

    Args:
        timer: measures the time.
        name: of the pass.
        call: computes the outputs from `leaves`.
        leaves: tensors that require gradients, all of which the outputs depend on.
        eager: measure eager_ms, too.

    Raises:
        RuntimeError: the pass cannot run. If it can, but not in a graph, `note` says so.
    """

    def prepare() -> Callable[[], Sequence[Tensor]]:
        if name == "forward":
            return torch.no_grad()(call)
        outputs = call()
        gradients = [torch.randn_like(output) for output in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    saved = 0.0 if name == "forward" else saved_gib(call)
    measured = prepare()
    measured()  # compiles, and loads kernels, whose memory is not the call's
    gib = extra_gib(measured)
    eager_ms = timer.ms(measured) if eager else None
    del measured  # autograd ties leaves to a stream while a forward on it is kept
    try:
        return Measured(graph_ms(timer, prepare), gib, saved, eager_ms)
    except RuntimeError as error:
        # Ending a broken capture raises, too; what broke it says more.
        first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        return Measured(None, gib, saved, eager_ms, f"no CUDA graph: {brief(first)}")


def brief(error: BaseException) -> str:
    """An error in one line."""
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def make_row(
    bench: str,
    shape: Shape,
    name: str,
    backend: str,
    stage: str,
    ms: float | None,
    extra_gib: float | None,
    **more: Any,
) -> Row:
    """A row of the result file: a pass of a shape on a backend; `more` holds what its kind has besides."""
    return {
        "bench": bench,
        "pass": name,
        "stage": stage,
        "backend": backend,
        "selection": shape.selection,
        "tokens": shape.tokens,
        "num_kv_heads": shape.num_kv_heads,
        "group_size": shape.group_size,
        "head_dim": shape.head_dim,
        "block_size": shape.block_size,
        "topk": shape.topk,
        "dtype": shape.dtype,
        "ms": ms,
        "extra_gib": extra_gib,
        **more,
    }


def csrc_sha256(root: Path = ROOT) -> str:
    """Hash of the kernels' source: over the files of csrc/ in sorted path order, each path, a NUL, its bytes, a NUL."""
    digest = hashlib.sha256()
    for path in sorted(path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*") if path.is_file()):
        digest.update(path.encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """What a result depends on besides the shape: GPU, versions, date (UTC) and the hash of the kernels' source."""
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": triton,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "csrc_sha256": csrc_sha256(),
    }


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    return answer[0].strip() or "unknown"


def stale_extension() -> str | None:
    """Why the installed extension is not the one of this checkout's csrc/, if it says so itself."""
    if importlib.util.find_spec("fsa._build_info") is None:
        return None
    built = getattr(importlib.import_module("fsa._build_info"), "CSRC_SHA256", "")
    if not built or built == csrc_sha256():
        return None
    return "the extension was built from other sources than csrc/; install again before measuring"


def require_gpu() -> None:
    """Exits with status 1 and a message if there is no CUDA device."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device and found none; --dry-run and --plot-only work without one")


def write_json(path: Path, header: dict[str, str], rows: list[Row]) -> None:
    """Writes a result file, a row a line.

    Raises:
        ValueError: the header or a row lacks a key.
    """
    if missing := [key for key in HEADER_KEYS[:-1] if key not in header]:
        raise ValueError(f"header lacks {missing}")
    for row in rows:
        if missing := [key for key in ROW_KEYS if key not in row]:
            raise ValueError(f"row lacks {missing}: {row}")
    lines = ",\n".join(json.dumps({key: _rounded(value) for key, value in row.items()}) for row in rows)
    head = json.dumps(header, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n')


def _rounded(value: object) -> object:
    """Four digits: the next one differs from run to run."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: it is not one.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or any(key not in content for key in HEADER_KEYS):
        raise ValueError(f"{path} is not a result file: it must be an object with {HEADER_KEYS}")
    return content


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return "  ".join([f"{first.strip():<{widths[0]}}", *others]).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])
