"""The package as users get it: a wheel built here, installed into a fresh venv, used outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HIDDEN_NVCC = {"CUDA_HOME": "/nonexistent", "CUDACXX": ""}

FORWARD_BACKWARD = """
import torch
import fsa, triton_ref

torch.manual_seed(0)
q = torch.randn(40, 4, 16, requires_grad=True)
k, v = (torch.randn(40, 2, 16, requires_grad=True) for _ in range(2))
topk_idx = torch.tensor([0, 1], dtype=torch.int32).expand(2, 40, 2).contiguous()
out = fsa.selected_attention(q, k, v, topk_idx, torch.tensor([0, 40], dtype=torch.int32), block_size=32)
dense = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
)[0].transpose(0, 1)
torch.testing.assert_close(out, dense)  # both blocks of every query: causal attention
for grad, expected in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(dense.sum(), (q, k, v))):
    torch.testing.assert_close(grad, expected)
print("installed at", fsa.__file__)
"""


# What is set for the tests, or by the caller for other builds.
NOT_FOR_USERS = ("FSA_BUILD_EXTENSION", "FSA_EMULATOR", "PYTHONPATH", "TRITON_INTERPRET")


def _run(
    *command: str | Path, cwd: Path = ROOT, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_USERS} | variables
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def _build_wheel(source: Path, folder: Path, **variables: str) -> tuple[Path, str]:
    """The wheel and what was printed. Its name is all that pip prints of a build that succeeds; -v shows the rest."""
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation")
    done = _run(*pip_wheel, "--wheel-dir", folder, source, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh venv that has this environment's torch, by its folder, and not the package under test."""
    venv = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    purelib = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    folders = [folder for folder in sys.path if folder.endswith("-packages")]
    Path(purelib, "outer.pth").write_text("\n".join(folders) + "\n")
    return python


def _use(python: Path, wheel: Path, folder: Path) -> str:
    """Installs the wheel, runs it from a folder of its own; returns what `python -m fsa` prints."""
    _run(python, "-m", "pip", "install", "--force-reinstall", "--no-deps", "--no-index", wheel)
    installed = _run(python, "-c", FORWARD_BACKWARD, cwd=folder).stdout
    assert f"installed at {python.parents[1]}" in installed
    return _run(python, "-m", "fsa", cwd=folder).stdout


def test_without_nvcc_the_wheel_is_pure_python_and_says_so(fresh_python: Path, tmp_path: Path) -> None:
    wheel, printed = _build_wheel(ROOT, tmp_path, **HIDDEN_NVCC)
    assert wheel.name.endswith("+cpu-py3-none-any.whl")
    assert "WITHOUT the CUDA extension: CUDA_HOME=/nonexistent leads to no nvcc" in printed
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith(".so") for name in names)
    assert {"fsa/py.typed", "triton_ref/py.typed", "triton_ref/stages.py"} <= set(names)

    report = _use(fresh_python, wheel, tmp_path)
    assert "CUDA_HOME=/nonexistent leads to no nvcc" in report


def _has_nvcc() -> bool:
    places = (
        shutil.which("nvcc"),
        os.environ.get("CUDACXX"),
        f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc",
    )
    return any(place and Path(place).is_file() for place in places)


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="needs nvcc")


@needs_nvcc
@pytest.mark.timeout(1800)
def test_with_nvcc_the_wheel_holds_the_extension_and_it_loads(fresh_python: Path, tmp_path: Path) -> None:
    wheel, _ = _build_wheel(ROOT, tmp_path)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert "+cu" in wheel.name
    assert "fsa/_C.so" in zipfile.ZipFile(wheel).namelist()

    report = _use(fresh_python, wheel, tmp_path)
    assert "extension not built" not in report
    assert "extension does not load" not in report


@needs_nvcc
def test_a_kernel_that_does_not_compile_fails_the_install(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "results"))
    broken = source / "csrc" / "bindings" / "bindings.cpp"
    broken.write_text("#error broken on purpose\n" + broken.read_text())
    # One instantiation is enough to see it.
    lists = source / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("set(head_dims 64 96 128 192 256)", "set(head_dims 64)"))

    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    done = _run(*pip_wheel, source, check=False, FSA_CUDA_ARCHS="80-real", MAX_JOBS="1")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout
    assert "The CUDA extension did not build" in done.stdout
    assert not list(tmp_path.glob("*.whl"))
