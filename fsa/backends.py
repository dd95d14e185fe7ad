"""Which backends can run here and why the others cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

# Dtypes of q, k and v that each backend takes.
DTYPES = {
    "cuda": (torch.float16, torch.bfloat16),
    "triton": (torch.float16, torch.bfloat16, torch.float32),
    "reference": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
# The interpreter computes wrong bf16 results without a word.
INTERPRETER_DTYPES = (torch.float16, torch.float32)

_EMULATED = "FSA_EMULATOR: the CUDA kernels run on the CPU in the emulator of tests/emulator"
_INTERPRETED = "TRITON_INTERPRET=1: Triton runs on the CPU under its interpreter"
_REMEDIES = {
    "cuda": "use tensors on an NVIDIA GPU and an fsa that was installed where nvcc is found, or backend='auto'",
    "triton": "use CUDA tensors with triton installed (or TRITON_INTERPRET=1 to try it on the CPU), or backend='auto'",
}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run tensors of one device, and why not (or what is particular about it)."""

    name: str
    usable: bool
    reason: str = ""


def _build_info() -> dict[str, str]:
    """What setup.py wrote about the build; empty where the package was never installed."""
    try:
        return vars(importlib.import_module("fsa._build_info"))
    except ImportError:
        return {}


def _load_extension() -> str:
    """Loads the compiled kernels; returns why they are missing, or nothing. Never raises: the others work without."""
    file = Path(os.environ.get("FSA_EMULATOR") or Path(__file__).with_name("_C.so"))
    if not file.is_file():
        return f"extension not built: {_build_info().get('NO_EXTENSION_BECAUSE') or 'fsa was not installed'}"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"extension does not load: {error}"
    return ""


_extension_missing = _load_extension()


def _kernel_arch_from_environment() -> int | None:
    text = os.environ.get("FSA_KERNEL_ARCH")
    if text is not None and text not in ("80", "90"):
        raise ValueError(f"FSA_KERNEL_ARCH must be 80 or 90, got {text!r}; unset it for the newest that runs")
    return int(text) if text else None


_newest_kernel_arch = _kernel_arch_from_environment()


def set_kernel_arch(arch: int | None) -> None:
    """Caps the architecture whose CUDA kernels run: 80 chooses those of sm_80 on a Hopper GPU too; None lifts the cap.

    For comparisons and tests; results agree within rounding. FSA_KERNEL_ARCH sets it at import.

    Raises:
        ValueError: arch is neither 80, 90 nor None.
    """
    if arch not in (80, 90, None):
        raise ValueError(f"arch must be 80, 90 or None, got {arch!r}; pass None for the newest that runs")
    global _newest_kernel_arch
    _newest_kernel_arch = arch


def kernel_arch(device: torch.device) -> int:
    """The architecture whose kernels the CUDA backend runs on the device: 90 for Hopper, if built for it, else 80."""
    newest = _device_kernel_arch(device)
    return newest if _newest_kernel_arch is None else min(newest, _newest_kernel_arch)


@functools.cache
def _device_kernel_arch(device: torch.device) -> int:
    if cuda_emulated():
        return 90
    built = "90a" in _build_info().get("CUDA_ARCHS", "")
    return 90 if built and torch.cuda.get_device_capability(device) == (9, 0) else 80


def cuda_emulated() -> bool:
    """Whether the CUDA backend's kernels are those of the emulator, for CPU tensors. Decided at import."""
    return bool(os.environ.get("FSA_EMULATOR"))


def triton_interprets() -> bool:
    """Whether Triton kernels run under the interpreter. Decided when they are first imported, as Triton does."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def status(name: str, device: torch.device) -> BackendStatus:
    """Whether the backend can run tensors of the device."""
    if name == "reference":
        return BackendStatus(name, True)
    reason = _cuda_obstacle(device) if name == "cuda" else _triton_obstacle(device)
    if name == "triton" and not reason and triton_interprets():
        return BackendStatus(name, True, _INTERPRETED)
    if name == "cuda" and not reason and cuda_emulated():
        return BackendStatus(name, True, _EMULATED)
    return BackendStatus(name, not reason, reason)


def _cuda_obstacle(device: torch.device) -> str:
    if _extension_missing:
        return _extension_missing
    if cuda_emulated():
        return "" if device.type == "cpu" else f"tensors are on {device.type}, the emulator takes CPU tensors"
    return _gpu_obstacle(device) or _capability_obstacle(device)


def _triton_obstacle(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton not installed"
    return "" if triton_interprets() else _gpu_obstacle(device)


def _gpu_obstacle(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if device.type == "cuda" else f"tensors are on {device.type}, it takes CUDA tensors"


def _capability_obstacle(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor} < 8.0" if major < 8 else ""


def require(name: str, device: torch.device) -> None:
    """Raises RuntimeError, with reason and remedy, if the backend cannot run tensors of the device."""
    found = status(name, device)
    if not found.usable:
        raise RuntimeError(
            f"backend must be usable for tensors on {device}, got backend={name!r}: {found.reason}; {_REMEDIES[name]}"
        )


def contract(family: str) -> tuple[tuple[torch.dtype, ...], str]:
    """Dtypes of q, k and v that a backend (or "auto") takes, and how messages call it."""
    if family == "auto":
        return DTYPES["reference"], "backend='auto'"
    if family == "triton" and triton_interprets():
        return INTERPRETER_DTYPES, "backend='triton' under TRITON_INTERPRET=1"
    return DTYPES[family], f"backend={family!r}"


def preferred(
    device: torch.device, dtype: torch.dtype, kernels: tuple[str, ...] = ("cuda", "triton")
) -> tuple[str, str]:
    """The backend that "auto" runs, and why not a faster one.

    On a GPU the first of those with kernels (Triton: compiled) that can, or the reference; else the reference.
    """
    obstacles: list[str] = []
    if device.type == "cuda":
        for name in kernels:
            found = status(name, device)
            if found.usable and found.reason != _INTERPRETED and dtype in DTYPES[name]:
                return name, "; ".join(obstacles)
            obstacles.append(f"{name}: {found.reason or f'does not take {dtype}'}")
    return "reference", "; ".join(obstacles)


@functools.cache
def choose(
    device: torch.device,
    dtype: torch.dtype,
    kernels: tuple[str, ...] = ("cuda", "triton"),
    what: str = "selected attention",
) -> str:
    """The preferred backend; warns, once per device, dtype and op, if a faster one exists that cannot run."""
    name, obstacles = preferred(device, dtype, kernels)
    if obstacles:
        warnings.warn(f"fsa: {what} of {dtype} tensors runs on {name} ({obstacles})", stacklevel=2)
    return name


def stages(name: str) -> ModuleType:
    """The module with the stages of a backend; imported when first needed, since each has its own dependencies."""
    return importlib.import_module({"cuda": "fsa.stages_cuda", "triton": "triton_ref.stages"}[name])


@dataclass(frozen=True)
class Info:
    """What runs here; `print` shows it as a table."""

    versions: dict[str, str]
    gpus: tuple[str, ...]
    backends: tuple[BackendStatus, ...]  # for CUDA tensors if there is a GPU, else for CPU tensors
    auto: dict[str, str]  # device type -> backend that "auto" runs for bf16 tensors

    def __str__(self) -> str:
        lines = [f"{name:<10} {version}" for name, version in self.versions.items()]
        lines += [f"{'GPU':<10} {gpu}" for gpu in self.gpus or ("none",)]
        lines += ["", "backends"]
        for backend in self.backends:
            reason = f" ({backend.reason})" if backend.reason else ""
            lines.append(f"  {backend.name:<10} {'usable' if backend.usable else 'not usable'}{reason}")
        lines += ["", 'backend="auto" runs']
        lines += [f"  {device.upper() + ' tensors':<13} on {name}" for device, name in self.auto.items()]
        return "\n".join(lines)


def info() -> Info:
    """Versions, GPUs, which backends are usable and why not, and what backend="auto" runs."""
    from . import __version__

    has_triton = importlib.util.find_spec("triton") is not None
    versions = {
        "fsa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "triton": str(importlib.import_module("triton").__version__) if has_triton else "none",
    }
    build = _build_info()
    if build.get("CUDA_VERSION"):
        versions["extension"] = f"built with CUDA {build['CUDA_VERSION']} for {build['CUDA_ARCHS']}"
    has_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if has_gpu else []
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    devices = [torch.device("cpu"), device] if has_gpu else [device]
    return Info(
        versions=versions,
        gpus=tuple(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}" for gpu in gpus),
        backends=tuple(status(name, device) for name in ("cuda", "triton", "reference")),
        auto={kind.type: preferred(kind, torch.bfloat16)[0] for kind in devices},
    )
