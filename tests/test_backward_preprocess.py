"""backward_preprocess: delta = rowsum(dout * out) - dlse."""

from __future__ import annotations

import pytest
import stage_reference
import torch
from harness import DEVICE
from stages import BACKENDS, DTYPES, load_stages, strided_rows
from tolerances import Expected, assert_close
from torch import Tensor

SHAPES = ((1, 1, 8), (37, 6, 24), (50, 3, 128), (21, 2, 256))  # total_q, num_heads, head_dim


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """out, dout (not contiguous) and dlse."""
    generator = torch.Generator().manual_seed(0)
    out, dout = (strided_rows(*shape, dtype, generator) for _ in range(2))
    dlse = torch.randn(shape[1], shape[0], generator=generator).to(DEVICE)
    return out.contiguous(), dout, dlse


def run(backend: str, out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    delta = torch.full((out.shape[1], out.shape[0]), torch.nan, device=DEVICE)
    load_stages(backend, out.dtype).backward_preprocess(out, dout, dlse, delta)
    return delta


def expected(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Expected:
    return stage_reference.expected(lambda a: stage_reference.delta(out, dout, dlse, a), out.dtype)


@pytest.mark.parametrize("with_dlse", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_preprocess(backend: str, shape: tuple[int, int, int], dtype: torch.dtype, with_dlse: bool) -> None:
    load_stages(backend, dtype)
    out, dout, dlse = make_inputs(shape, dtype)
    inputs = (out, dout, dlse if with_dlse else None)
    assert_close("delta", run(backend, *inputs), expected(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_dout(backend: str) -> None:
    """A gradient of one row for all tokens and heads, as of a sum, has strides of zero."""
    load_stages(backend, torch.float16)
    out, dout, dlse = make_inputs(SHAPES[1], torch.float16)
    dout = dout[0, 0].contiguous().expand(out.shape)
    assert_close("delta", run(backend, out, dout, dlse), expected(out, dout, dlse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_agrees_with_triton(dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        load_stages(backend, dtype)
    inputs = make_inputs(SHAPES[1], dtype)
    wanted = stage_reference.recentred(expected(*inputs), run("triton", *inputs))
    assert_close("delta", run("cuda", *inputs), wanted)
