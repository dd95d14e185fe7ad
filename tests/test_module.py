"""`FlashSparseAttention` against its dense definition, and as PyTorch sees it."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import nsa_reference
import pytest
import torch
from harness import DEVICE, HAS_GPU, Target, skip_unless_usable
from nsa_reference import Config, dense_module
from tolerances import Expected, assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fsa
from fsa import FlashSparseAttention, RopeConfig
from fsa.module import fsa as module_file

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}
THETA = 500.0
ROPE = (THETA, LLAMA3)
# Long enough to leave blocks out; shorter than a window, than a block, empty, and one token.
LENGTHS = (331, 20, 0, 50, 1, 97)
PUBLISHED = ("hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "kernel_size", "kernel_stride", "block_size",
             "topk", "init_blocks", "local_blocks", "window_size")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A module and the lengths of the sequences it sees."""

    name: str
    config: Config = Config()
    options: tuple[tuple[str, str], ...] = ()  # keyword arguments of the constructor
    lengths: tuple[int, ...] = LENGTHS

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("published"),
    Case("mean_pooling", options=(("compression", "mean"),)),
    Case("gate_a_head", options=(("gate", "head"),)),
    Case("group_1_three_places", Config(num_q_heads=2, kernel_size=48, topk=3, local_blocks=1)),
    Case("group_7", Config(num_q_heads=7, num_kv_heads=1, head_dim=8, init_blocks=0, local_blocks=1, topk=2)),
    Case("stride_is_window", Config(kernel_size=16, block_size=32, window_size=1)),
    Case("large_window", Config(window_size=500), lengths=(70, 40)),
    Case("all_shorter_than_a_window", lengths=(31, 5, 0, 1)),
    Case("small", Config(head_dim=8, kernel_size=16, kernel_stride=8, block_size=32, topk=3), lengths=(110, 9, 40)),
]
TARGETS = (
    [
        Target("auto", torch.bfloat16),
        Target("auto", torch.float16),
        Target("triton", torch.bfloat16),
        Target("reference", torch.float64),
    ]
    if HAS_GPU
    else [
        Target("reference", torch.float64),
        Target("auto", torch.float32),
        Target("auto", torch.bfloat16),
        Target("cuda", torch.float16),  # in the emulator
        Target("triton", torch.float32),  # under its interpreter
    ]
)
# Without a GPU kernels are slow: they run one small case, in which some blocks are left out.
SLOW = () if HAS_GPU else ("cuda", "triton")


def make(case: Case, dtype: torch.dtype, backend: str = "auto") -> FlashSparseAttention:
    """The same module in every run, in the dtype."""
    torch.manual_seed(0)
    rope_config = RopeConfig(head_dim=case.config.head_dim, rope_theta=THETA, rope_scaling=LLAMA3)
    options: dict[str, Any] = dict(case.options)
    module = FlashSparseAttention(
        **dataclasses.asdict(case.config), rope_config=rope_config, backend=backend, **options
    )
    return module.to(DEVICE, dtype)


def make_input(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and cu_seqlens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((sum(case.lengths), case.config.hidden_size), generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=DEVICE)
    return x.to(DEVICE, dtype), cu_seqlens


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the modules of a test select, in the order of their calls."""
    found: list[Tensor] = []

    def record(*arguments: Any, **options: Any) -> Tensor:
        found.append(select_blocks(*arguments, **options))
        return found[-1]

    select_blocks = module_file.select_blocks
    monkeypatch.setattr(module_file, "select_blocks", record)
    yield found


def results_of(out: Tensor, x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every parameter, for the same dout in every dtype."""
    generator = torch.Generator().manual_seed(2)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, (x, *parameters.values()), dout, allow_unused=True)
    found = dict(zip(("x", *parameters), gradients, strict=True))
    assert all(gradient is not None for gradient in found.values())
    return {"out": out.detach()} | found


def defined(case: Case, module: FlashSparseAttention, x: Tensor, topk_idx: Tensor | None, dtype: torch.dtype) -> Any:
    """Results of the definition in a dtype, from the values that the module holds; scores and topk_idx."""
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}
    x = x.detach().to(dtype).requires_grad_()
    out, scores, topk_idx = dense_module(parameters, x, case.lengths, case.config, ROPE, topk_idx)
    return results_of_definition(out, x, parameters), scores, topk_idx


def results_of_definition(out: Tensor, x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `results_of`; what the definition never touched (no window: no compression) has the gradient 0."""
    untouched = {name: p for name, p in parameters.items() if "compress" in name or "pe" in name}
    return results_of(out + sum((0 * p.sum() for p in untouched.values()), out.new_zeros(())), x, parameters)


def assert_selected_well(topk_idx: Tensor, scores: list[nsa_reference.Scores], case: Case, tolerance: float) -> None:
    """Rows are what the definition takes, but for blocks whose scores differ by less than the tolerance."""
    for chosen, wanted in zip(topk_idx.split(list(case.lengths), 1), scores, strict=True):
        blocks = wanted.scores.shape[-1]
        taken = (chosen[..., None].long() == torch.arange(blocks, device=chosen.device)).any(2)  # [heads, n, blocks]
        count = wanted.candidates.sum(-1).clamp(max=case.config.topk)
        assert torch.equal(taken.sum(-1), count.expand(taken.shape[:2]))
        assert bool((taken | ~wanted.forced).all()) and bool((wanted.candidates | ~taken).all())
        free = taken & ~wanted.forced
        lowest_taken = torch.where(free, wanted.scores, torch.inf).amin(-1) if blocks else wanted.scores.sum(-1)
        left = wanted.candidates & ~taken
        highest_left = torch.where(left, wanted.scores, -torch.inf).amax(-1) if blocks else wanted.scores.sum(-1)
        assert bool((highest_left - lowest_taken <= tolerance).all())


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:fsa. .* runs on")
def test_module(case: Case, target: Target, selections: list[Tensor]) -> None:
    """Output and all gradients, ragged sequences; in float64 the selection too is that of the definition."""
    if target.backend in SLOW and case.name != "small":
        pytest.skip("one case is enough of a slow backend")
    if target.backend != "auto":
        skip_unless_usable(target.backend)
    module = make(case, target.dtype, target.backend)
    x, cu_seqlens = make_input(case, target.dtype)
    x.requires_grad_()
    actual = results_of(module(x, cu_seqlens), x, dict(module.named_parameters()))
    (topk_idx,) = selections
    exact, scores, wanted = defined(case, module, x, topk_idx, torch.float64)
    if target.dtype == torch.float64:
        _, _, wanted = defined(case, module, x, None, torch.float64)
        assert torch.equal(topk_idx, wanted)
        for name, value in actual.items():
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-9 * float(exact[name].abs().max()))
        return
    # A score is at most the group's heads times kernel_size / kernel_stride; its error some ulp of the logits.
    assert_selected_well(topk_idx, scores, case, 4 * case.config.num_q_heads * torch.finfo(target.dtype).eps)
    in_dtype, _, _ = defined(case, module, x, topk_idx, target.dtype)
    for name, value in actual.items():
        assert_close(name, value, Expected(exact[name], in_dtype[name], exact[name].abs()))


def test_published_example() -> None:
    """The constructor call of the published package, with its model made smaller and its sequences shorter."""
    from fsa.module.fsa import FlashSparseAttention, RopeConfig

    attention = (
        FlashSparseAttention(
            hidden_size=128,
            num_q_heads=4,
            num_kv_heads=4,
            head_dim=128,
            kernel_size=32,
            kernel_stride=16,
            block_size=64,
            topk=16,
            init_blocks=1,
            local_blocks=2,
            window_size=512,
            rope_config=RopeConfig(
                max_position_embeddings=131072,
                head_dim=128,
                rope_theta=500000,
                rope_scaling={
                    "factor": 8.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
            ),
        )
        .to(DEVICE)
        .to(torch.bfloat16)
    )
    seqlens = torch.tensor([500, 150], dtype=torch.int32, device=DEVICE)
    cu_seqlens = torch.zeros(len(seqlens) + 1, dtype=torch.int32, device=DEVICE)
    cu_seqlens[1:] = seqlens.cumsum(0)
    x = torch.zeros(int(cu_seqlens[-1]), 128, device=DEVICE, dtype=torch.bfloat16).uniform_(-1, 1)
    y = attention(x, cu_seqlens)
    loss = (y * torch.randn_like(y)).sum(-1).mean()
    loss.backward()
    assert y.shape == x.shape and y.dtype == x.dtype and bool(y.isfinite().all())
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.count_nonzero() > 0, name


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------
def test_state_dict_is_that_of_published_checkpoints() -> None:
    c = Config(num_q_heads=6, num_kv_heads=3)
    module = make(Case("names", c), torch.float32)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        "compress_key": (3, c.kernel_size * c.head_dim, c.head_dim),
        "compress_value": (3, c.kernel_size * c.head_dim, c.head_dim),
        "intra_block_pe": (3, c.kernel_size, c.head_dim),
        "proj_q.weight": (6 * c.head_dim, c.hidden_size),
        "proj_k.weight": (3 * c.head_dim, c.hidden_size),
        "proj_v.weight": (3 * c.head_dim, c.hidden_size),
        "proj_o.weight": (c.hidden_size, 6 * c.head_dim),
        "gate.0.weight": (3, c.hidden_size),
    }


def test_state_dict_round_trip() -> None:
    module, (x, cu_seqlens) = make(CASES[0], torch.float32), make_input(CASES[0], torch.float32)
    other = make(CASES[0], torch.float32)
    other.init_params()  # other values than the module's
    assert not torch.equal(other(x, cu_seqlens), module(x, cu_seqlens))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x, cu_seqlens), module(x, cu_seqlens))


def test_options_change_the_parameters() -> None:
    assert not any("compress" in name or "pe" in name for name in make(CASES[1], torch.float32).state_dict())
    assert make(CASES[2], torch.float32).gate[0].weight.shape == (3 * 4, 48)


def test_positional_arguments_are_the_published_ones() -> None:
    config = dataclasses.asdict(Config())
    rope_config = RopeConfig(head_dim=16)
    module = FlashSparseAttention(*(config[name] for name in PUBLISHED), rope_config)
    assert {name: getattr(module, name) for name in PUBLISHED} == config
    assert module.rope_config is rope_config


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half().float(),
        lambda module: copy.deepcopy(module).bfloat16(),
        lambda module: module.to("meta").to_empty(device=DEVICE),
    ],
    ids=["bf16", "half", "copy", "meta"],
)
def test_casts_leave_the_frequencies_alone(cast: Callable[[nn.Module], nn.Module]) -> None:
    module = make(CASES[0], torch.float32)
    wanted = module.rope.inv_freq.clone()
    assert torch.equal(cast(module).rope.inv_freq, wanted)  # type: ignore[union-attr, arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# As PyTorch sees it
# ---------------------------------------------------------------------------------------------------------------------
def train_step(module: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The result and the gradients of all parameters."""
    module.zero_grad()
    result = call(*inputs)
    result.float().square().sum().backward()
    gradients = [p.grad for p in module.parameters()]
    return [result.detach().clone(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_alike(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected) == 9
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).double().norm() <= tolerance * e.double().norm()


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0)])
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_no_tokens(lengths: tuple[int, ...], backend: str) -> None:
    if backend != "auto":
        skip_unless_usable(backend)
    case, dtype = Case("empty", lengths=lengths), torch.float16
    module, (x, cu_seqlens) = make(case, dtype, backend), make_input(case, dtype)
    out = module(x.requires_grad_(), cu_seqlens)
    out.sum().backward()
    assert out.shape == (0, 48) and x.grad is not None


def test_max_seqlen_and_int64_cu_seqlens_change_nothing() -> None:
    dtype = torch.bfloat16
    module, (x, cu_seqlens) = make(CASES[0], dtype), make_input(CASES[0], dtype)
    out = module(x, cu_seqlens)
    assert torch.equal(module(x, cu_seqlens.long(), max_seqlen=max(LENGTHS)), out)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    module, (x, cu_seqlens) = make(CASES[0], torch.float32), make_input(CASES[0], torch.float32)
    inputs = x.requires_grad_(), cu_seqlens
    recomputed = functools.partial(checkpoint, module, use_reentrant=use_reentrant)
    assert_alike(train_step(module, recomputed, inputs), train_step(module, module, inputs), 1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("auto", torch.float32), ("triton", torch.float16), ("cuda", torch.float16)]
)
def test_compile(backend: str, dtype: torch.dtype) -> None:
    """Forward and backward in one graph each, for several lengths."""
    if backend != "auto":
        skip_unless_usable(backend)
    module = make(CASES[0], dtype, backend)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in ((70, 20), (90, 33)) if backend == "auto" else ((40,),):
        inputs = make_input(Case("compile", lengths=lengths), dtype)
        expected = train_step(module, module, inputs)
        assert_alike(train_step(module, compiled, inputs), expected, 1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.gpu
def test_compile_with_inductor() -> None:
    module, inputs = make(CASES[0], torch.bfloat16), make_input(CASES[0], torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    assert_alike(train_step(module, compiled, inputs), train_step(module, module, inputs), 0.05)


def test_autocast() -> None:
    module, (x, cu_seqlens) = make(CASES[0], torch.float32), make_input(CASES[0], torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = module(x, cu_seqlens)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert (out - module(x, cu_seqlens)).double().norm() <= 0.03 * out.double().norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")
def test_same_bits_every_time() -> None:
    """Forward and backward; on a GPU torch's sliding window adds dQ up by atomics unless it is told not to."""
    torch.use_deterministic_algorithms(HAS_GPU, warn_only=True)
    dtype = torch.bfloat16
    module, inputs = make(CASES[0], dtype), make_input(CASES[0], dtype)
    once, twice = (train_step(module, module, inputs) for _ in range(2))
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_sequences_do_not_see_each_other() -> None:
    case = Case("pair", lengths=(150, 90))
    module, (x, cu_seqlens) = make(case, torch.float32), make_input(case, torch.float32)
    out = module(x, cu_seqlens)
    alone = module(x[150:].contiguous(), cu_seqlens.new_tensor([0, 90]))
    torch.testing.assert_close(out[150:], alone, rtol=1e-5, atol=1e-5)
    x[150:] *= 3
    assert torch.equal(module(x, cu_seqlens)[:150], out[:150])


def test_published_function() -> None:
    q, k = torch.randn(128, 4, 16, device=DEVICE), torch.randn(128, 2, 16, device=DEVICE)
    topk_idx = torch.zeros(2, 128, 1, dtype=torch.int32, device=DEVICE)
    cu_seqlens = torch.tensor([0, 50, 128], dtype=torch.int32, device=DEVICE)
    out = fsa.ops.FSA_topk_sparse_attention(q, k, k, topk_idx, 32, cu_seqlens, 0.3)
    wanted = fsa.selected_attention(q, k, k, topk_idx, cu_seqlens, block_size=32, softmax_scale=0.3)
    assert torch.equal(out, wanted)


def test_docstring_example() -> None:
    found = doctest.testmod(module_file)
    assert found.attempted > 0 and found.failed == 0
