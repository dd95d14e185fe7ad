"""Builds the CUDA extension fsa/_C.so where nvcc and torch are found, else a pure-Python package that says why.

A kernel that does not compile fails the install: only a missing compiler or torch leaves the extension out.

Environment:
    FSA_BUILD_EXTENSION=0   leave the extension out
    FSA_CUDA_ARCHS          CMake's CUDA architectures, default "80;90a-real" (PTX of the first serves later GPUs)
    FSA_STRICT=1            every compiler warning, register spills included, fails the build
    CUDACXX, CUDA_HOME      the compiler to use; where one is set, no other place is searched
    MAX_JOBS                parallel compilations, default one a core
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)


class Missing(Exception):
    """Something that the extension needs is not on this machine."""


@dataclass(frozen=True)
class Toolchain:
    nvcc: Path
    cuda_version: str  # "13.0"
    torch: Path  # the installed package

    @property
    def local_version(self) -> str:
        return "cu" + self.cuda_version.replace(".", "")


def find_toolchain() -> Toolchain:
    """nvcc and torch, or Missing with the reason."""
    if os.environ.get("FSA_BUILD_EXTENSION") == "0":
        raise Missing("FSA_BUILD_EXTENSION=0 was set")
    nvcc = find_nvcc()
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", output)
    if release is None:
        raise SystemExit(f"{nvcc} --version names no release: {output}")
    return Toolchain(nvcc, release.group(1), find_torch())


def find_nvcc() -> Path:
    for variable, suffix in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc")):
        if os.environ.get(variable):
            nvcc = Path(os.environ[variable], suffix)
            if nvcc.is_file():
                return nvcc
            raise Missing(f"{variable}={os.environ[variable]} leads to no nvcc")
    on_path = shutil.which("nvcc")
    candidates = [
        *([Path(on_path)] if on_path else []),
        *(path for site in site_folders() for path in sorted(site.glob("nvidia/cu*/bin/nvcc"), reverse=True)),
        Path("/usr/local/cuda/bin/nvcc"),
    ]
    for nvcc in candidates:
        if nvcc.is_file():
            return nvcc
    raise Missing("nvcc was not found (CUDACXX, CUDA_HOME, PATH, nvidia/cu* in site-packages, /usr/local/cuda)")


def find_torch() -> Path:
    """The installed torch, without importing it: any build of it will do, with CUDA or without."""
    for site in site_folders():
        torch = site / "torch"
        if (torch / "version.py").is_file():
            text = (torch / "version.py").read_text()
            version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", text)
            if version is None or (int(version[2]), int(version[3])) < MIN_TORCH:
                found = version[1] if version else "an unknown version"
                raise Missing(f"torch {found} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}")
            return torch
    raise Missing("torch was not found; install it first, then this package with --no-build-isolation")


def site_folders() -> Iterator[Path]:
    """Where packages are installed. pip's isolated builds hide those of the environment that it installs into, from
    imports only; that environment's torch is the one that the extension will meet."""
    yield from (Path(folder) for folder in sys.path if folder)
    yield Path(sysconfig.get_path("purelib"))
    yield Path(sysconfig.get_path("platlib"))


def find_tool(name: str, folder_attribute: str) -> str:
    """cmake or ninja: of the package of that name, whose scripts are not on PATH unless its venv is, or from PATH."""
    packaged = getattr(importlib.import_module(name), folder_attribute, "") if importlib.util.find_spec(name) else ""
    found = shutil.which(name, path=packaged + os.pathsep + os.environ.get("PATH", ""))
    if found is None:
        raise SystemExit(f"{name} is needed to build the CUDA extension: pip install {name}")
    return found


def csrc_sha256() -> str:
    """Of the files of csrc/ in sorted path order: each path, a NUL, its bytes, a NUL. Benchmark records carry it."""
    digest = hashlib.sha256()
    for path in sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes() + b"\0")
    return digest.hexdigest()


def base_version() -> str:
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "fsa" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "fsa/__init__.py must define __version__"
    return found[1]


try:
    toolchain: Toolchain | None = find_toolchain()
    obstacle = ""
except Missing as missing:
    toolchain = None
    obstacle = str(missing)
cuda_archs = os.environ.get("FSA_CUDA_ARCHS", "80;90a-real")


class BuildPython(build_py):
    """Also writes fsa/_build_info.py, which `python -m fsa` reads."""

    def run(self) -> None:
        if not self.editable_mode:
            # A module deleted from the source since the last build must not reach the wheel.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        folder = ROOT / "fsa" if self.editable_mode else Path(self.build_lib, "fsa")
        lines = [
            '"""How this copy of fsa was built. Written by setup.py."""',
            "",
            f'CUDA_VERSION = "{toolchain.cuda_version if toolchain else ""}"  # of the extension; empty: not built',
            f'CUDA_ARCHS = "{cuda_archs if toolchain else ""}"',
            f'CSRC_SHA256 = "{csrc_sha256() if toolchain else ""}"',
            f"NO_EXTENSION_BECAUSE = {obstacle!r}",
        ]
        (folder / "_build_info.py").write_text("\n".join(lines) + "\n")
        if toolchain is None:
            (folder / "_C.so").unlink(missing_ok=True)
            print(
                f"\nflash-sparse-attention: WITHOUT the CUDA extension: {obstacle}.\n"
                "The op runs on Triton on a GPU and on the PyTorch reference elsewhere; `python -m fsa` tells which.\n",
                file=sys.stderr,
            )

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, "fsa", "_build_info.py"))]


class BuildExtension(build_ext):
    """CMake and Ninja, in a folder that outlives the command: a second build recompiles what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # torch.ops.load_library loads it: no Python version in its name

    def build_extension(self, ext: Extension) -> None:
        assert toolchain is not None
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        options = [
            f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}",
            f"-DFSA_TORCH_DIR={toolchain.torch}",
            f"-DFSA_CUDA_ARCHS={cuda_archs}",
            f"-DFSA_STRICT={'ON' if os.environ.get('FSA_STRICT') == '1' else 'OFF'}",
        ]
        # CMake cannot take over a folder from another version of itself or from another compiler.
        version = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True).stdout
        key = hashlib.sha256("\n".join([version, *options]).encode()).hexdigest()[:8]
        build = ROOT / "build" / f"{toolchain.local_version}-{key}"
        environment = dict(os.environ)
        # The toolkit from PyPI has lib/, where nvcc looks for lib64/.
        libraries = toolchain.nvcc.resolve().parents[1] / "lib"
        environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), os.environ.get("LIBRARY_PATH")]))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        print(f"Building with {toolchain.nvcc} ({toolchain.cuda_version}) and {toolchain.torch} in {build}", flush=True)
        options.append(f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}")
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options],
            [cmake, "--build", str(build), "-j", jobs],
        ):
            if subprocess.run(command, env=environment, check=False).returncode:
                raise SystemExit(
                    "The CUDA extension did not build; the compiler's message stands above. "
                    "FSA_BUILD_EXTENSION=0 installs the package without it."
                )
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "_C.so", output)


class SourceDistribution(sdist):
    """The source is the same whatever compiler this machine has."""

    def run(self) -> None:
        self.distribution.metadata.version = base_version()
        super().run()


class Wheel(bdist_wheel):
    """The extension uses torch's stable ABI and nothing of Python's: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    version=f"{base_version()}+{toolchain.local_version if toolchain else 'cpu'}",
    ext_modules=[Extension("fsa._C", sources=[])] if toolchain else [],
    cmdclass={
        "build_py": BuildPython,
        "build_ext": BuildExtension,
        "bdist_wheel": Wheel,
        "sdist": SourceDistribution,
    },
)
