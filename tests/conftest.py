"""Set-up of all tests: where Triton runs, markers, fixtures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import compiled
import pytest
import torch

# Before anything imports triton, whose kernels are made for the interpreter or for a GPU when they are defined, and
# fsa, which loads the CUDA kernels or those of the emulator. Where that cannot be built, fsa has no kernels and their
# tests are skipped.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(compiled.CannotBuild):
        os.environ["FSA_EMULATOR"] = str(compiled.emulator())
    torch.set_num_threads(1)  # for tensors of some dozens of rows, waking threads takes longer than the work


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "large: big problems on a GPU; `-m 'not large'` leaves them out")
    # Of Triton's interpreter, which is NumPy: its own, and NaN and infinities that are there on purpose.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in:RuntimeWarning:triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def kernel_arch(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test's target says which CUDA kernels run: those of its `arch`, or the newest."""
    from fsa import backends

    parameters = getattr(request.node, "callspec", None)
    arch = getattr(parameters.params.get("target"), "arch", None) if parameters else None
    if arch is None:
        yield
        return
    backends.set_kernel_arch(arch)
    yield
    backends.set_kernel_arch(None)


@pytest.fixture(autouse=True)
def emulator_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under the emulator, a test draws the same schedules whenever it runs; FSA_EMULATOR_SEED asks for others."""
    seed = f"{os.environ.get('FSA_EMULATOR_SEED', '')} {request.node.nodeid}".strip()
    with mock.patch.dict(os.environ, FSA_EMULATOR_SEED=seed):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integers): whoever reads what nobody wrote shows it."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().item(), "PyTorch does not fill empty tensors"
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@pytest.fixture
def workspace_limit() -> Iterator[None]:
    """Lets a test set the workspace limit; restores it."""
    import fsa

    limit = fsa.get_workspace_limit()
    yield
    fsa.set_workspace_limit(limit)
