"""Selection of blocks on the CPU, and its operators."""

from __future__ import annotations

import nsa_reference
import pytest
import torch
from harness import DEVICE, skip_unless_usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from module_inputs import call_op, cu_seqlens_of, make_arguments, randn
from nsa_reference import Config

from fsa.module.compressed_attention import compressed_attention
from fsa.module.compression import find_windows
from fsa.module.selection import select_blocks, take_highest


@st.composite
def _selections(draw: st.DrawFn) -> tuple[Config, tuple[int, ...], int]:
    stride = draw(st.sampled_from([4, 8, 16]))
    init_blocks, local_blocks = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    config = Config(
        num_kv_heads=2,
        num_q_heads=2 * draw(st.integers(1, 3)),
        head_dim=8,
        kernel_size=stride * draw(st.integers(1, 32 // stride)),
        kernel_stride=stride,
        block_size=draw(st.sampled_from([32, 64])),
        topk=max(1, init_blocks + local_blocks + draw(st.integers(0, 4))),
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    return config, tuple(draw(st.lists(st.integers(0, 260), min_size=1, max_size=3))), draw(st.integers(0, 2**20))


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(_selections())
def test_selection_is_that_of_the_definition(drawn: tuple[Config, tuple[int, ...], int]) -> None:
    """Forced blocks, none of the future, ascending, and the exact top of the dense scores."""
    config, lengths, seed = drawn
    total = sum(lengths)
    cu_seqlens = cu_seqlens_of(lengths)
    sizes = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
    windows = find_windows(cu_seqlens, total, **sizes)
    q, k = randn(total, config.num_q_heads, 8, seed=seed), randn(total // config.kernel_stride, 2, 8, seed=seed + 1)
    _, lse = compressed_attention(q, k, k, cu_seqlens, windows.cu_seqlens, **sizes)
    topk_idx = select_blocks(
        q, k, lse, cu_seqlens, windows.cu_seqlens, **sizes, block_size=config.block_size, topk=config.topk,
        init_blocks=config.init_blocks, local_blocks=config.local_blocks,
    )  # fmt: skip
    assert topk_idx.dtype == torch.int32 and topk_idx.shape == (2, total, config.topk)
    bounds, window_bounds = cu_seqlens.tolist(), windows.cu_seqlens.tolist()
    for b, n in enumerate(lengths):
        part, parts = slice(bounds[b], bounds[b + 1]), slice(window_bounds[b], window_bounds[b + 1])
        starts = torch.tensor(nsa_reference.window_starts(n, config), dtype=torch.int64)
        complete = starts + config.kernel_size - 1 <= torch.arange(n)[:, None]
        _, probs = nsa_reference.attend(q[part], k[parts], k[parts], complete[None])
        scores = nsa_reference.block_scores(probs, n, config)
        wanted = nsa_reference.highest_blocks(scores, config)
        rows = (topk_idx[:, part] != wanted).any(-1).nonzero().tolist()
        # Only blocks of equal score, up to rounding, may differ.
        for head, query in rows:
            taken, best = (set(x[head, query].tolist()) for x in (topk_idx[:, part], wanted))
            values = [float(scores.scores[head, query, block]) for block in taken ^ best]
            assert len(taken) == len(best) and max(values) - min(values) <= 1e-12
            assert topk_idx[head, bounds[b] + query].tolist() == sorted(taken)


def test_ties_go_to_the_first_block() -> None:
    scores, own = torch.tensor([[[1.0, 2, 2, 1, 2, 1, 9]]]), torch.tensor([5])
    assert take_highest(scores, own, 2, 0, 0).tolist() == [[[1, 2]]]
    assert take_highest(scores, own, 4, 1, 1).tolist() == [[[0, 1, 2, 5]]]
    assert take_highest(torch.zeros(1, 1, 7), own, 4, 0, 1).tolist() == [[[0, 1, 2, 5]]]
    assert take_highest(scores, own, 8, 0, 0).tolist() == [[[0, 1, 2, 3, 4, 5, -1, -1]]]
    assert take_highest(scores * torch.nan, own, 2, 0, 1).tolist() == [[[0, 5]]]
    assert take_highest(scores, torch.tensor([-1]), 2, 1, 1).tolist() == [[[-1, -1]]]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("select_blocks", torch.float32),
        ("_select_blocks_reference", torch.float32),
        ("_select_blocks_cuda", torch.float16),
    ],
)
def test_selection_opcheck(name: str, dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    if name.endswith("cuda"):
        skip_unless_usable("cuda")
        device = DEVICE
    q, k, v, *rest = make_arguments(dtype=dtype, requires_grad=False, device=device)
    _, lse = call_op((q, k, v, *rest))
    arguments = (q, k, lse, *rest[:4], 32, 3, 1, 1, None)
    torch.library.opcheck(getattr(torch.ops.fsa, name).default, arguments)


def test_selection_has_no_gradient() -> None:
    q, k, v, *rest = make_arguments()
    _, lse = call_op((q, k, v, *rest))
    options = {"kernel_size": 16, "kernel_stride": 8, "block_size": 32, "topk": 2, "init_blocks": 1, "local_blocks": 1}
    assert not select_blocks(q, k, lse, *rest[:2], **options).requires_grad
