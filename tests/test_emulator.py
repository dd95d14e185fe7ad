"""The emulator's warpgroup products and copy engine: kernels of nothing else, right and with mistakes.

The mistakes must not go unnoticed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiled import native_functions

ROWS = 128  # two warpgroups

# tests/emulator/wgmma_forms.cuh, enum Mistake
NO_PROXY_FENCE, NO_BARRIER, NO_REGISTER_FENCE, RESULTS_TOO_SOON, NO_WAIT = 1, 2, 3, 4, 5
OPERAND_OVERWRITTEN, ACCUMULATORS_OVERWRITTEN, WARP_MISSING, DESCRIPTORS_DIFFER, OUT_OF_BOUNDS = 6, 7, 8, 9, 10

# tests/emulator/box_copies.cuh, enum Mistake
READ_TOO_SOON, BARRIER_INSTEAD, OTHER_BOX_AWAITED = 1, 2, 3
TOO_FEW_EXPECTED, TOO_MANY_EXPECTED, TOO_MANY_ARRIVALS, NOT_WAITED_FOR = 4, 5, 6, 7
MATRIX = [7 * i + 1 for i in range(128 * 32)]
NOTHING_YET = 2**32 - 1  # what shared memory is filled with


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return native_functions()


def _assert_stops(native: ModuleType, call: str, message: str) -> None:
    assert native.__file__
    done = subprocess.run(
        [sys.executable, "-c", f"import fsa_native_tests as native\n{call}"],
        cwd=Path(native.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr


def _matrices(columns: int, total: int) -> list[torch.Tensor]:
    """A, B, C of small integers: products are exact in every order of summation."""
    generator = torch.Generator().manual_seed(columns + total)
    shapes = ((ROWS, total), (total, columns), (ROWS, columns))
    return [torch.randint(-8, 9, shape, generator=generator).float() for shape in shapes]


@pytest.mark.parametrize("total", (128, 96), ids=("panels of 64 along the sum", "panels of 32 along the sum"))
@pytest.mark.parametrize("b_operand", ("sum", "outer"))
@pytest.mark.parametrize("a_operand", ("registers", "sum", "outer"))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_products_of_every_form(native: ModuleType, dtype: str, a_operand: str, b_operand: str, total: int) -> None:
    for columns in (32, 64, 96, 128):
        a, b, c = _matrices(columns, total)
        d = native.emulated_wgmma(
            dtype, a_operand, b_operand, columns, total, *(m.flatten().tolist() for m in (a, b, c)), 0
        )
        assert torch.equal(torch.tensor(d).view(ROWS, columns), a @ b + c)


def test_products_keep_subnormal_and_nonfinite_elements(native: ModuleType) -> None:
    a, b = torch.zeros(ROWS, 96), torch.zeros(96, 32)
    a[0, 0], a[1, 1], a[2, 2], a[70, 95] = 2.0**-24, float("inf"), float("nan"), -3.0
    b[0, 0] = b[1, 0] = b[2, 0] = b[95, 31] = 1.0
    c = torch.zeros(ROWS, 32)
    d = native.emulated_wgmma("float16", "sum", "sum", 32, 96, *(m.flatten().tolist() for m in (a, b, c)), 0)
    torch.testing.assert_close(torch.tensor(d).view(ROWS, 32), a @ b, rtol=0, atol=0, equal_nan=True)


def test_accumulators_are_nan_until_waited_for(native: ModuleType) -> None:
    matrices = [m.flatten().tolist() for m in _matrices(64, 128)]
    d = native.emulated_wgmma("float16", "sum", "sum", 64, 128, *matrices, RESULTS_TOO_SOON)
    assert torch.tensor(d).isnan().all()


@pytest.mark.parametrize(
    ("mistake", "message"),
    (
        (NO_PROXY_FENCE, "shared memory without fence_async_proxy"),
        (NO_BARRIER, "shared memory without fence_async_proxy and a barrier"),
        (NO_REGISTER_FENCE, "without wgmma_fence"),
        (NO_WAIT, "ended without waiting"),
        (OPERAND_OVERWRITTEN, "shared memory without fence_async_proxy"),
        (ACCUMULATORS_OVERWRITTEN, "accumulators were written before"),
        (WARP_MISSING, "of their warpgroup that have ended"),
        (DESCRIPTORS_DIFFER, "disagree about a product"),
        (OUT_OF_BOUNDS, "outside of shared memory"),
    ),
)
def test_mistakes_with_products_stop_the_run(native: ModuleType, mistake: int, message: str) -> None:
    _assert_stops(
        native,
        f"native.emulated_wgmma('float16', 'sum', 'sum', 64, 128, [1.0] * {ROWS * 128}, [1.0] * {128 * 64}, "
        f"[0.0] * {ROWS * 64}, {mistake})",
        message,
    )


def test_boxes_are_there_for_those_who_wait(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10):
        monkeypatch.setenv("FSA_EMULATOR_SEED", str(seed))
        assert native.emulated_box_copies(MATRIX, 0) == MATRIX


def test_launches_differ_and_a_seed_repeats_them(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_determinism compares launches, so these must differ; what a schedule found must be found again."""

    def launches(seed: str) -> list[list[int]]:
        monkeypatch.setenv("FSA_EMULATOR_SEED", seed)
        return [native.emulated_box_copies(MATRIX, OTHER_BOX_AWAITED) for _ in range(4)]

    first, other, again = launches("one"), launches("other"), launches("one")
    assert first[0] != first[1] or first[1] != first[2]
    assert first != other
    assert first == again


@pytest.mark.parametrize("mistake", (READ_TOO_SOON, BARRIER_INSTEAD, OTHER_BOX_AWAITED))
def test_boxes_are_not_there_for_others(native: ModuleType, monkeypatch: pytest.MonkeyPatch, mistake: int) -> None:
    """Not in all orders, at least."""
    found = []
    for seed in range(10):
        monkeypatch.setenv("FSA_EMULATOR_SEED", str(seed))
        found += native.emulated_box_copies(MATRIX, mistake)
    assert NOTHING_YET in found


@pytest.mark.parametrize(
    ("mistake", "message"),
    (
        (TOO_FEW_EXPECTED, "bytes at an mbarrier that does not expect them"),
        (TOO_MANY_EXPECTED, "threads wait for an mbarrier at which nobody will arrive"),
        (TOO_MANY_ARRIVALS, "an arrival at an mbarrier at whose phase all have arrived"),
        (NOT_WAITED_FOR, "all threads have ended before what the copy engine brings was there"),
    ),
)
def test_mistakes_with_boxes_stop_the_run(native: ModuleType, mistake: int, message: str) -> None:
    _assert_stops(native, f"native.emulated_box_copies({MATRIX}, {mistake})", message)
