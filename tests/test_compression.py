"""Packed sequences, and the windows into which keys and values are compressed."""

from __future__ import annotations

import itertools

import nsa_reference
import pytest
import torch
from harness import DEVICE, skip_unless_usable
from module_inputs import cu_seqlens_of, randn
from nsa_reference import Config
from torch import Tensor

from fsa.module.compression import find_windows, linear_compression, mean_pooling
from fsa.module.packed import packed_rows


@pytest.mark.parametrize("lengths", [(3, 0, 0, 2, 1), (0, 0), (0, 4), (4, 0), (1,)])
def test_packed_rows(lengths: tuple[int, ...]) -> None:
    rows = packed_rows(cu_seqlens_of(lengths), sum(lengths))
    assert rows.position.tolist() == [i for n in lengths for i in range(n)]
    assert rows.sequence.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]


def test_rows_of_no_sequence() -> None:
    assert packed_rows(torch.tensor([2, 4, 5]), 7).position.tolist() == [-1, -1, 0, 1, 0, -1, -1]
    assert packed_rows(torch.tensor([-5, 100]), 3).position.tolist() == [0, 1, 2]


def many_lengths() -> tuple[int, ...]:
    """More sequences than the kernel adds up at a time."""
    return tuple(torch.randint(0, 9, (1100,), generator=torch.Generator().manual_seed(0)).tolist())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("cu_seqlens", "total"),
    [
        (cu_seqlens_of((70, 31, 0, 32, 33, 5)), 171),
        (cu_seqlens_of((0, 0, 600, 0)), 600),
        (cu_seqlens_of((15,)), 15),
        (cu_seqlens_of((0,)), 0),
        (cu_seqlens_of(many_lengths()), sum(many_lengths())),
        (torch.tensor([-5, 1000], dtype=torch.int32), 300),
        (torch.tensor([7, 50, 90], dtype=torch.int32), 100),
    ],
    ids=["ragged", "empty_around", "short", "no_token", "many", "beyond", "within"],
)
@pytest.mark.parametrize(("kernel_size", "kernel_stride"), [(32, 16), (48, 8), (16, 16), (5, 1)])
def test_both_backends_find_the_same_windows(
    cu_seqlens: Tensor, total: int, kernel_size: int, kernel_stride: int
) -> None:
    skip_unless_usable("triton")
    arguments = (cu_seqlens.to(DEVICE), total, kernel_size, kernel_stride)
    actual, wanted = (find_windows(*arguments, backend=backend) for backend in ("triton", "reference"))
    for name, value in wanted._asdict().items():
        found = getattr(actual, name)
        assert found.dtype == value.dtype and torch.equal(found, value), name


@pytest.mark.parametrize("name", ["find_windows", "_find_windows_triton", "_find_windows_reference"])
def test_find_windows_opcheck(name: str) -> None:
    skip_unless_usable("triton" if "triton" in name else "reference")
    for lengths in ((70, 31, 0), (3,), (0,)):
        arguments = (cu_seqlens_of(lengths, DEVICE), sum(lengths), 32, 16)
        torch.library.opcheck(getattr(torch.ops.fsa, name).default, arguments)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "cu_seqlens",
    [(0, 1000), (5, 2), (-3, 7), (90, 10, 300), (50, 50), (0, 100, 0, 100, 0), (100, 0, -(2**31), 2**31 - 1)],
)
def test_windows_of_wrong_cu_seqlens_stay_in_bounds(cu_seqlens: tuple[int, ...], backend: str) -> None:
    skip_unless_usable(backend)
    windows = find_windows(torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE), 100, 16, 8, backend=backend)
    bounds = {"cu_seqlens": 12, "terms": 23, "chunk_tokens": 99, "token_places": 95, "positions": 99}
    for name, last in bounds.items():
        values = getattr(windows, name)
        assert values.min() >= (-1 if name == "positions" else 0) and values.max() <= last, name
    assert bool((windows.cu_seqlens.diff() >= 0).all())


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("lengths", [(70, 31, 0, 32, 33, 5), (15,), (0,), (16, 16, 16)])
@pytest.mark.parametrize(("kernel_size", "kernel_stride"), [(32, 16), (32, 8), (16, 16), (5, 1)])
def test_compression(lengths: tuple[int, ...], kernel_size: int, kernel_stride: int, mean: bool) -> None:
    config = Config(head_dim=8, kernel_size=kernel_size, kernel_stride=kernel_stride)
    x, weight = randn(sum(lengths), 2, 8), randn(2, kernel_size * 8, 8, seed=1)
    pe = randn(2, kernel_size, 8, seed=2)
    windows = find_windows(cu_seqlens_of(lengths), len(x), kernel_size, kernel_stride)
    parts = x.split(lengths)
    if mean:
        actual = mean_pooling(x, windows, kernel_size, kernel_stride)
        wanted = [nsa_reference.compress(part, None, None, config) for part in parts]
    else:
        actual = linear_compression(x, weight, windows, kernel_stride, pe)
        wanted = [nsa_reference.compress(part, weight, pe, config) for part in parts]
    assert windows.cu_seqlens.tolist() == [0, *itertools.accumulate(map(len, wanted))]
    assert actual.shape == (len(x) // kernel_stride, 2, 8)
    count = int(windows.cu_seqlens[-1])
    torch.testing.assert_close(actual[:count], torch.cat(wanted), rtol=1e-12, atol=1e-12)
    starts = [start for n in lengths for start in nsa_reference.window_starts(n, config)]
    assert windows.position[:count].tolist() == starts
    assert windows.token_position.tolist() == [i for n in lengths for i in range(n)]


@pytest.mark.parametrize("lengths", [(70, 31, 0, 32, 5), (15,)])
def test_compression_gradcheck(lengths: tuple[int, ...]) -> None:
    windows = find_windows(cu_seqlens_of(lengths), sum(lengths), 32, 16)
    count = int(windows.cu_seqlens[-1])
    tensors = (randn(sum(lengths), 2, 8), randn(2, 32 * 8, 8, seed=1), randn(2, 32, 8, seed=2))
    inputs = [x.requires_grad_() for x in tensors]

    def compress(x: Tensor, weight: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        return linear_compression(x, weight, windows, 16, pe)[:count], mean_pooling(x, windows, 32, 16)[:count]

    assert torch.autograd.gradcheck(compress, inputs, fast_mode=True)


def test_compression_of_values_has_no_position_embedding() -> None:
    x, weight = randn(40, 1, 8), randn(1, 32 * 8, 8, seed=1)
    windows = find_windows(cu_seqlens_of((40,)), 40, 32, 8)
    first = x[:32].flatten() @ weight[0]
    torch.testing.assert_close(linear_compression(x, weight, windows, 8)[0, 0], first)
