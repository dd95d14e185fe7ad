"""Which backends are tested here in which dtypes, and how a test calls one through the public function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from cases import Case, cases
from reference import Inputs, Results
from tolerances import Expected, expected_results
from torch import Tensor

import fsa
from fsa import backends

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Target:
    """A backend, the dtype of q, k and v, and for CUDA the newest architecture whose kernels may run (conftest.py)."""

    backend: str
    dtype: torch.dtype
    arch: int | None = None

    def __str__(self) -> str:
        return f"{self.backend}{self.arch or ''}-{_NAMES[self.dtype]}"


TARGETS = (
    [
        Target("cuda", torch.float16),
        Target("cuda", torch.bfloat16),
        Target("triton", torch.float16),
        Target("triton", torch.bfloat16),
        Target("reference", torch.bfloat16),
    ]
    if HAS_GPU
    else [
        Target("cuda", torch.float16),  # in the emulator
        Target("cuda", torch.bfloat16),
        Target("triton", torch.float16),  # under its interpreter, which computes wrong bf16 results
        Target("triton", torch.float32),
        Target("reference", torch.bfloat16),
        Target("reference", torch.float32),
        Target("reference", torch.float64),
    ]
)
if backends.status("cuda", DEVICE).usable and backends.kernel_arch(DEVICE) > 80:
    TARGETS += [Target("cuda", torch.float16, arch=80), Target("cuda", torch.bfloat16, arch=80)]
# For tests that need not run in every dtype.
MAIN_TARGETS = [TARGETS[1], TARGETS[3]] if HAS_GPU else [TARGETS[1], TARGETS[2]]
# For tests that take long on Triton: it compiles, or is interpreted, for seconds.
LEAN_TARGETS = [target for target in TARGETS if target.backend != "triton" or target in MAIN_TARGETS]
CASES = cases(small=not HAS_GPU)

# Cases for a second dtype on Triton, which on a GPU compiles for seconds and in the interpreter runs for seconds.
_FEW_CASES = (
    "basic",
    "more_keys",
    "repeated_slots",
    "tiny_sequences",
    "head_dim_40",
    "nonfinite_masked_kv",
    "fused_qkv",
)
# On a GPU Triton compiles anew for each of these; other backends, and the interpreter, run them all.
_SIMILAR_SHAPES = ("group_size_1", "group_size_3", "group_size_4", "group_size_8", "head_dim_8", "head_dim_64")
_SIMILAR_SHAPES += ("head_dim_96", "head_dim_128", "head_dim_192", "block_size_64", "block_size_128")


def takes(target: Target, case: Case) -> bool:
    """Whether the case is run on the target."""
    if target.dtype not in case.dtypes:
        return False
    if target.backend != "triton":
        return True
    if target not in MAIN_TARGETS:
        return case.name in _FEW_CASES
    return not (HAS_GPU and case.name in _SIMILAR_SHAPES)


def skip_unless_usable(backend: str) -> None:
    """Skips the test, with the backend's own reason, if the backend cannot run here."""
    status = backends.status(backend, DEVICE)
    if not status.usable:
        pytest.skip(f"{backend}: {status.reason}")


def forward(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """out and lse, by the public function."""
    out, lse = fsa.selected_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.topk_idx,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        block_size=inputs.block_size,
        softmax_scale=inputs.softmax_scale,
        causal=inputs.causal,
        return_lse=True,
        backend=backend,
    )
    return out, lse


def run(inputs: Inputs, backend: str) -> Results:
    """Both results and all gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = forward(inputs.replace(q=q, k=k, v=v), backend)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
    return Results(out.detach(), lse.detach(), dq, dk, dv)


def assert_same_bits(one: Results, other: Results) -> None:
    """Equal bit for bit; NaN equals NaN."""
    for name, x in vars(one).items():
        assert torch.equal(_bits(x), _bits(getattr(other, name))), f"{name} differs from run to run"


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@functools.lru_cache(maxsize=2)
def problem(case: Case, dtype: torch.dtype) -> tuple[Inputs, dict[str, Expected]]:
    """A case's inputs on the device of the tests, and what is expected."""
    inputs = case.inputs(dtype, DEVICE)
    return inputs, expected_results(inputs)


def large_inputs(
    len_q: Sequence[int],
    len_k: Sequence[int] | None = None,
    *,
    num_kv_heads: int,
    group_size: int,
    head_dim: int = 128,
    block_size: int = 64,
    topk: int = 16,
    popularity: float = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """A causal problem made on the device itself. Every slot by itself draws a visible block; the larger `popularity`,
    the more of them the first one."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    lengths_q = torch.tensor(len_q, device=DEVICE)
    lengths_k = lengths_q if len_k is None else torch.tensor(len_k, device=DEVICE)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=DEVICE)

    def prefix_sums(lengths: Tensor) -> Tensor:
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()

    cu_seqlens_q, cu_seqlens_k = prefix_sums(lengths_q), prefix_sums(lengths_k)
    total_q, total_k, num_heads = sum(len_q), int(lengths_k.sum()), num_kv_heads * group_size
    last_key = torch.arange(total_q, device=DEVICE) + (lengths_k - lengths_q - cu_seqlens_q[:-1]).repeat_interleave(
        lengths_q
    )
    visible = (last_key // block_size + 1).clamp(min=0)[:, None]
    draw = torch.rand((num_kv_heads, total_q, topk), generator=generator, device=DEVICE) ** popularity
    return Inputs(
        q=randn(total_q, num_heads, head_dim),
        k=randn(total_k, num_kv_heads, head_dim),
        v=randn(total_k, num_kv_heads, head_dim),
        topk_idx=torch.minimum(draw * visible, visible - 1).int(),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_size=block_size,
        softmax_scale=None,
        causal=True,
        dout=randn(total_q, num_heads, head_dim),
        dlse=randn(num_heads, total_q, dtype=torch.float32),
    )


def peak_memory_of(call: Callable[[], object]) -> int:
    """The most bytes in use during a call, beyond those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch warns where it has none."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
