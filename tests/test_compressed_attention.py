"""Compressed attention on the CPU, and its operators."""

from __future__ import annotations

import pytest
import torch
from module_inputs import call_op, make_arguments, randn
from torch import Tensor

from fsa.module import compressed_attention as compressed_file
from fsa.module.compression import find_windows, mean_pooling
from fsa.module.selection import select_blocks


def finite(lse: Tensor) -> Tensor:
    """lse with 0 where a query sees nothing."""
    return torch.where(lse.isfinite(), lse, 0)


OPERATORS = ["compressed_attention", "_compressed_attention_reference"]


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True)])
def test_compressed_attention_gradcheck(use: tuple[bool, bool]) -> None:
    q, k, v, *rest = make_arguments((50, 9))

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, lse = call_op((*tensors, *rest))
        return (out,) * use[0] + (finite(lse),) * use[1]

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_compressed_attention_opcheck(name: str) -> None:
    arguments = make_arguments(dtype=torch.float32)
    torch.library.opcheck(getattr(torch.ops.fsa, name).default, arguments)
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    out, lse = call_op((q, k, v, *rest), name)
    backward = getattr(torch.ops.fsa, f"{name}_backward").default
    for dout, dlse in ((out, finite(lse)), (out, None), (None, finite(lse))):
        torch.library.opcheck(backward, (dout, dlse, q, k, v, out, lse, *rest))


def test_queries_that_see_no_window() -> None:
    arguments = make_arguments((15, 20))
    out, lse = call_op(arguments)
    seen = torch.tensor([False] * 15 + [False] * 15 + [True] * 5)
    assert torch.equal(lse.isneginf(), ~seen.expand(4, -1))
    assert torch.equal((out != 0).flatten(1).any(1), seen)
    (dq,) = torch.autograd.grad(out.sum() + finite(lse).sum(), arguments[0])
    assert torch.equal((dq != 0).flatten(1).any(1), seen)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["future", "padding"])
def test_windows_that_are_not_seen_may_hold_anything(what: str, poison: float) -> None:
    """Windows that end at token 39 or later, and other sequences, for the tokens before; padding, for all tokens."""
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in make_arguments((60, 40)))
    tokens, windows = (slice(39), slice(3, None)) if what == "future" else (slice(None), slice(int(rest[1][-1]), None))

    def results(k: Tensor, v: Tensor) -> list[Tensor]:
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = call_op((*tensors, *rest))
        loss = out[tokens].sum() + finite(lse)[:, tokens].sum()
        dq, *key_gradients = torch.autograd.grad(loss, tensors)
        # Of tokens that do see what is poisoned, keys get NaN.
        return [out[tokens], lse[:, tokens], dq[tokens], *(key_gradients if what == "padding" else ())]

    bad_k, bad_v = k.clone(), v.clone()
    bad_k[windows] = bad_v[windows] = poison
    assert len(bad_k[windows]) > 0
    for clean, dirty in zip(results(k, v), results(bad_k, bad_v), strict=True):
        assert torch.equal(clean, dirty)


def test_extreme_logits() -> None:
    q, k, v, *rest = make_arguments()
    out, lse = call_op((q * 1e4, k, v, *rest))
    assert bool(out.isfinite().all()) and not bool(lse.isnan().any())
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[Tensor]:
        arguments = make_arguments()
        out, lse = call_op(arguments)
        options = {"kernel_size": 16, "kernel_stride": 8, "block_size": 32, "topk": 2}
        topk_idx = select_blocks(
            *arguments[:2], lse, *arguments[3:5], **options, init_blocks=0, local_blocks=1, backend="reference"
        )
        return [out, lse, topk_idx, *torch.autograd.grad(out.sum() + finite(lse).sum(), arguments[:3])]

    whole = results()
    for queries, size in ((1, 1 << 20), (7, 1 << 20), (256, 1), (256, 5 * 4 * 16 * 8)):
        monkeypatch.setattr(compressed_file, "_CHUNK_QUERIES", queries)
        monkeypatch.setattr(compressed_file, "_CHUNK_BYTES", size)
        for actual, expected in zip(results(), whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_wrong_cu_seqlens_stay_in_bounds() -> None:
    q, k, v, _, _, *rest = make_arguments((60, 40))
    for hostile in ((0, 1000), (5, 2), (-3, 7), (90, 10, 300), (50, 50)):
        cu_seqlens = torch.tensor(hostile, dtype=torch.int32)
        windows = find_windows(cu_seqlens, 100, 16, 8)
        x = randn(100, 2, 8)
        mean_pooling(x, windows, 16, 8)
        for compressed_cu_seqlens in (windows.cu_seqlens, cu_seqlens):
            out, lse = call_op((q, k, v, cu_seqlens, compressed_cu_seqlens, *rest))
            assert bool(out.isfinite().all()) and not bool(lse.isnan().any())
