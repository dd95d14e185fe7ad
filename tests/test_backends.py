"""Which backend runs, why not another one, and that the user is told."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from harness import DEVICE, HAS_GPU

import fsa
from fsa import backends
from fsa.backends import BackendStatus

GPU = torch.device("cuda", 0)
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def statuses(monkeypatch: pytest.MonkeyPatch, cuda: str, triton: str) -> None:
    """A machine with a GPU where the backends are usable, or not for these reasons."""

    def status(name: str, device: torch.device) -> BackendStatus:
        reason = {"cuda": cuda, "triton": triton, "reference": ""}[name]
        return BackendStatus(name, usable=not reason or reason.startswith("TRITON_INTERPRET"), reason=reason)

    monkeypatch.setattr(backends, "status", status)
    backends.choose.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "triton", "dtype", "chosen", "why"),
    [
        ("", "", HALF, "cuda", ""),
        ("", "", SINGLE, "triton", "cuda: does not take torch.float32"),
        ("", "", DOUBLE, "reference", "cuda: does not take torch.float64; triton: does not take torch.float64"),
        ("extension not built", "", HALF, "triton", "cuda: extension not built"),
        ("extension not built", "triton not installed", HALF, "reference", "cuda: extension not built; triton: triton"),
        ("extension not built", "TRITON_INTERPRET=1: Triton runs on the CPU under its interpreter", HALF, "reference",
         "cuda: extension not built; triton: TRITON_INTERPRET=1"),
    ],
)  # fmt: skip
def test_auto_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: str, triton: str, dtype: torch.dtype, chosen: str, why: str
) -> None:
    statuses(monkeypatch, cuda, triton)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backends.choose(GPU, dtype) == backends.choose(GPU, dtype) == chosen
    backends.choose.cache_clear()
    assert len(caught) == bool(why), "one warning, and only if something faster exists"
    if why:
        assert why in str(caught[0].message) and f"runs on {chosen}" in str(caught[0].message)


def test_auto_on_the_cpu_is_the_reference_without_a_word() -> None:
    backends.choose.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(torch.device("cpu"), SINGLE) == "reference"


def test_reasons_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_extension_missing", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FSA_EMULATOR", raising=False)
    status, cpu = backends.status.__wrapped__, torch.device("cpu")
    assert status("cuda", cpu) == BackendStatus("cuda", False, "no CUDA device")
    assert status("triton", cpu) == BackendStatus("triton", False, "no CUDA device")
    assert status("reference", cpu) == BackendStatus("reference", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert status("triton", cpu).usable and "interpreter" in status("triton", cpu).reason
    monkeypatch.setattr(backends, "_extension_missing", "extension not built: nvcc was not found")
    assert status("cuda", cpu).reason == "extension not built: nvcc was not found"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert status("triton", cpu) == BackendStatus("triton", False, "triton not installed")


def test_reasons_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(backends, "_extension_missing", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FSA_EMULATOR", raising=False)
    status = backends.status.__wrapped__
    assert status("cuda", GPU) == BackendStatus("cuda", False, "compute capability 7.5 < 8.0")
    assert status("triton", GPU) == BackendStatus("triton", True)
    assert status("cuda", torch.device("cpu")).reason == "tensors are on cpu, it takes CUDA tensors"


def test_emulated_kernels_take_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_extension_missing", "")
    monkeypatch.setenv("FSA_EMULATOR", "somewhere")
    found = backends.status.__wrapped__("cuda", torch.device("cpu"))
    assert found.usable and found.reason.startswith("FSA_EMULATOR: ")
    found = backends.status.__wrapped__("cuda", GPU)
    assert found == BackendStatus("cuda", False, "tensors are on cuda, the emulator takes CPU tensors")


def test_an_extension_that_does_not_load_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FSA_EMULATOR", raising=False)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    monkeypatch.setattr(backends, "_build_info", lambda: {"NO_EXTENSION_BECAUSE": "nvcc was not found"})
    assert backends._load_extension() == "extension not built: nvcc was not found"
    monkeypatch.setattr(backends, "_build_info", dict)
    assert backends._load_extension() == "extension not built: fsa was not installed"
    (tmp_path / "_C.so").write_text("not a library")
    assert backends._load_extension().startswith("extension does not load: ")


def test_info() -> None:
    info = fsa.info()
    assert info.versions["fsa"] == fsa.__version__ and info.versions["torch"] == torch.__version__
    assert [backend.name for backend in info.backends] == ["cuda", "triton", "reference"]
    assert info.auto["cpu"] == "reference"
    assert bool(info.gpus) == HAS_GPU == ("cuda" in info.auto)
    text = str(info)
    for backend in info.backends:
        assert backend == backends.status(backend.name, DEVICE)
        assert backend.usable or backend.reason in text


def test_command_line() -> None:
    result = subprocess.run([sys.executable, "-m", "fsa"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(fsa.info())


def test_kernel_arch_is_80_90_or_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="arch must be 80, 90 or None, got 100"):
        backends.set_kernel_arch(100)
    monkeypatch.setenv("FSA_KERNEL_ARCH", "91")
    with pytest.raises(ValueError, match="FSA_KERNEL_ARCH must be 80 or 90, got '91'"):
        backends._kernel_arch_from_environment()
