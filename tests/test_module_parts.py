"""The parts of the module, each against its part of the dense definition, and what the definition does not say."""

from __future__ import annotations

import doctest
import functools
import itertools
from collections.abc import Callable
from typing import Any

import nsa_reference
import pytest
import torch
from harness import DEVICE, HAS_GPU, skip_unless_usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsa_reference import Config
from torch import Tensor

from fsa.module import compressed_attention as compressed_file
from fsa.module import fsa as module_file
from fsa.module.compressed_attention import compressed_attention
from fsa.module.compression import find_windows, linear_compression, mean_pooling
from fsa.module.packed import packed_rows
from fsa.module.rope import RopeConfig, RotaryEmbedding, rotate
from fsa.module.selection import select_blocks, take_highest
from fsa.module.sliding_window import sliding_window_attention

CPU = torch.device("cpu")
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


def cu_seqlens_of(lengths: tuple[int, ...], device: torch.device = CPU) -> Tensor:
    """Prefix sums."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Tensor:
    """Normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Packed sequences, compression
# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# RoPE
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scaling", [None, LLAMA3 | {"rope_type": "llama3"}, LLAMA3 | {"type": "llama3"}])
def test_rope(scaling: dict[str, Any] | None) -> None:
    config = RopeConfig(head_dim=64, rope_scaling=scaling)
    position = torch.tensor([0, 1, 77, 8191, 131071, 3_000_000])
    x = randn(6, 3, 64)
    angle = nsa_reference.angles(position, config.rope_theta, 64, LLAMA3 if scaling else None)
    wanted = nsa_reference.rotated(x, angle)
    rope = RotaryEmbedding(config)
    torch.testing.assert_close(rotate(x, *rope(position, torch.float64)), wanted, rtol=1e-9, atol=1e-9)
    actual = rotate(x.bfloat16(), *rope.bfloat16()(position, torch.bfloat16))
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-2, atol=3e-2)
    assert actual.dtype == torch.bfloat16


def test_rope_keeps_relative_positions() -> None:
    rope, q, k = RotaryEmbedding(RopeConfig(head_dim=16)), randn(1, 1, 16), randn(1, 1, 16, seed=1)

    def product(i: int, j: int) -> Tensor:
        return (rotate(q, *rope(torch.tensor([i]), q.dtype)) * rotate(k, *rope(torch.tensor([j]), q.dtype))).sum()

    torch.testing.assert_close(product(12, 5), product(100_012, 100_005), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_frequencies_are_those_of_transformers(rope_type: str) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = None if rope_type == "default" else LLAMA3 | {"rope_type": "llama3"}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=256, num_attention_heads=2, rope_theta=500000.0, rope_scaling=scaling)
    )
    ours = RotaryEmbedding(RopeConfig(head_dim=128, rope_theta=500000.0, rope_scaling=scaling))
    torch.testing.assert_close(ours.inv_freq.float(), theirs.inv_freq.float(), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Compressed attention
# ---------------------------------------------------------------------------------------------------------------------
def make_arguments(
    lengths: tuple[int, ...] = (50, 9, 0, 70),
    dtype: torch.dtype = torch.float64,
    head_dim: int = 8,
    requires_grad: bool = True,
    device: torch.device = CPU,
) -> tuple[Any, ...]:
    """Arguments of the operator: 4 query heads on 2 KV heads, windows of 16 tokens, one every 8, and padding."""
    total = sum(lengths)
    cu_seqlens = cu_seqlens_of(lengths, device)
    windows = find_windows(cu_seqlens, total, 16, 8)
    n = total // 8
    tensors = (randn(total, 4, head_dim), randn(n, 2, head_dim, seed=1), randn(n, 2, head_dim, seed=2))
    q, k, v = (x.to(device, dtype).requires_grad_(requires_grad) for x in tensors)
    return q, k, v, cu_seqlens, windows.cu_seqlens, 16, 8, None


def finite(lse: Tensor) -> Tensor:
    """lse with 0 where a query sees nothing."""
    return torch.where(lse.isfinite(), lse, 0)


OPERATORS = ["compressed_attention", "_compressed_attention_reference"]


def call_op(arguments: tuple[Any, ...], name: str = "_compressed_attention_reference") -> tuple[Tensor, Tensor]:
    """out and lse."""
    return getattr(torch.ops.fsa, name).default(*arguments)  # type: ignore[no-any-return]


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


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("name", ["select_blocks", "_select_blocks_reference"])
def test_selection_opcheck(name: str) -> None:
    q, k, v, *rest = make_arguments(dtype=torch.float32, requires_grad=False)
    _, lse = call_op((q, k, v, *rest))
    arguments = (q, k, lse, *rest[:4], 32, 3, 1, 1, None)
    torch.library.opcheck(getattr(torch.ops.fsa, name).default, arguments)


def test_selection_has_no_gradient() -> None:
    q, k, v, *rest = make_arguments()
    _, lse = call_op((q, k, v, *rest))
    options = {"kernel_size": 16, "kernel_stride": 8, "block_size": 32, "topk": 2, "init_blocks": 1, "local_blocks": 1}
    assert not select_blocks(q, k, lse, *rest[:2], **options).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Sliding window
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window_size", [1, 2, 24, 64, 500])
@pytest.mark.parametrize("lengths", [(50, 0, 1, 33), (97,)])
def test_sliding_window(lengths: tuple[int, ...], window_size: int) -> None:
    device, dtype = DEVICE, torch.float16 if HAS_GPU else torch.float64
    tensors = [randn(sum(lengths), heads, 16, seed=heads, dtype=dtype, device=device) for heads in (6, 2, 3)]
    q, k, v = tensors[0], tensors[1], tensors[2][:, :2]
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    cu_seqlens = cu_seqlens_of(lengths, device)
    out = sliding_window_attention(*inputs, cu_seqlens, window_size=window_size)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = []
    for part in zip(*(x.split(lengths) for x in exact), strict=True):
        position = torch.arange(len(part[0]), device=device)
        behind = position[:, None] - position
        wanted.append(nsa_reference.attend(*part, ((behind >= 0) & (behind < window_size))[None])[0])
    dout = randn(*out.shape, seed=9, dtype=dtype, device=device)
    gradients = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(torch.cat(wanted), exact, dout.double())
    tolerance = 5e-3 if HAS_GPU else 1e-9
    for a, b in zip((out, *gradients), (torch.cat(wanted), *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_sliding_window_outside_of_sequences() -> None:
    x = randn(10, 1, 8)
    out = sliding_window_attention(x, x, x, torch.tensor([2, 6], dtype=torch.int32), window_size=3)
    assert (out == 0).flatten(1).all(1).tolist() == [True, True, False, False, False, False, True, True, True, True]


def test_scale() -> None:
    """softmax_scale of the parts; None is head_dim ** -0.5."""
    q, k, v, cu_seqlens, compressed_cu_seqlens, *_ = make_arguments(requires_grad=False)
    windows: dict[str, Any] = {"kernel_size": 16, "kernel_stride": 8}
    compressed = functools.partial(compressed_attention, q, k, v, cu_seqlens, compressed_cu_seqlens, **windows)
    x = randn(q.shape[0], 2, 8)
    sliding = functools.partial(sliding_window_attention, q, x, x, cu_seqlens, window_size=5)
    parts: tuple[Callable[..., Tensor], ...] = (lambda **scale: compressed(**scale)[0], sliding)
    for part in parts:
        assert torch.equal(part(), part(softmax_scale=8**-0.5))
        assert not torch.allclose(part(), part(softmax_scale=1.0))


def test_docstring_example() -> None:
    found = doctest.testmod(module_file)
    assert found.attempted > 0 and found.failed == 0
