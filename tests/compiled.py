"""Builds what the tests load of csrc/ on machines without a GPU: host functions, and the kernels under the emulator."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


class CannotBuild(Exception):
    """This machine lacks what the target needs."""


def native_functions() -> ModuleType:
    """The host functions that tests/native/bindings.cpp exposes."""
    try:
        folder = _build("fsa_native_tests")
    except CannotBuild as missing:
        pytest.skip(str(missing))
    path = folder / "native" / f"fsa_native_tests{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("fsa_native_tests", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulator() -> Path:
    """The library of tests/emulator, for the environment variable FSA_EMULATOR.

    Raises:
        CannotBuild: headers are missing.
    """
    return _build("_emulator") / "emulator" / "_emulator.so"


@functools.cache
def _build(target: str) -> Path:
    """Builds a CMake target of tests/; returns where the folders of the targets are."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/include/cuda_fp16.h").exists():
        raise CannotBuild("needs the headers of the CUDA toolkit")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise CannotBuild("needs Python's headers")
    import ninja
    import pybind11

    folder = ROOT / "build" / f"tests-{sys.implementation.cache_tag}"
    cmake = [sys.executable, "-m", "cmake"]
    options = [
        "-DFSA_BUILD_EXTENSION=OFF",
        "-DFSA_BUILD_TESTS=ON",
        f"-DFSA_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=ninja.BIN_DIR + os.pathsep + os.environ['PATH'])}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of pytest's workers, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [*cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options],
            [*cmake, "--build", str(folder), "--target", target],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            assert done.returncode == 0, done.stdout
    return folder / "tests"
