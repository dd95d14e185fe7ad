"""Rotary position embedding: its frequencies, with and without Llama 3's scaling, and the rotation.

Pairs are (i, i + head_dim / 2), not neighbours. Angles are computed in float64 and rounded as cosine and sine, so a
position of some hundred thousand is as exact as a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..pipeline import as_kernel_input
from ..registration import Definition, register, register_gradient
from . import checks


def _llama3_scaling() -> dict[str, Any]:
    return {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


@dataclass
class RopeConfig:
    """Rotary embedding of a model; the defaults are Llama 3.1's.

    rope_scaling: None or {"rope_type": "default"} for none; {"rope_type": "llama3", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings"}. "type" is taken for "rope_type".
    max_position_embeddings, hidden_size and num_attention_heads change nothing: they are there so that whatever
    describes a model can be passed whole. Positions may exceed max_position_embeddings.
    """

    max_position_embeddings: int = 131072
    head_dim: int = 128
    rope_theta: float = 500000
    rope_scaling: Mapping[str, Any] | None = field(default_factory=_llama3_scaling)
    hidden_size: int = 4096
    num_attention_heads: int = 32

    @property
    def rope_type(self) -> str:
        """Name of the scaling, "default" for none."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))


def frequencies(config: RopeConfig) -> list[float]:
    """Radians a position turns each of the head_dim / 2 pairs by, highest first.

    Raises:
        ValueError: head_dim is odd, the rope_type is unknown, or the scaling lacks a number.
    """
    if config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"head_dim of RopeConfig must be even, got {config.head_dim}; pass that of the attention")
    if config.rope_type not in _SCALINGS:
        supported = ", ".join(repr(name) for name in _SCALINGS)
        raise ValueError(f"rope_type must be one of {supported}, got {config.rope_type!r}; choose one in rope_scaling")
    # Su et al., arXiv 2104.09864, section 3.2.2.
    plain = [config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    return _SCALINGS[config.rope_type](plain, config.rope_scaling or {})


def _unscaled(plain: list[float], scaling: Mapping[str, Any]) -> list[float]:
    return plain


def _llama3(plain: list[float], scaling: Mapping[str, Any]) -> list[float]:
    """Pairs that turn rarely within the original context are slowed by `factor`, those that turn often are kept, those
    between are blended. Source: Llama 3.1, `apply_scaling` of Meta's llama-models."""
    *names, last = (name for name in _llama3_scaling() if name != "rope_type")
    missing = [name for name in (*names, last) if name not in scaling]
    if missing:
        raise ValueError(
            f"rope_scaling of rope_type 'llama3' must have {', '.join(names)} and {last}, got none of "
            f"{', '.join(missing)}; add them"
        )
    factor, low, high = (float(scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling["original_max_position_embeddings"])

    def scaled(frequency: float) -> float:
        turns = context * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return frequency * (kept + (1 - kept) / factor)

    return [scaled(frequency) for frequency in plain]


_SCALINGS: dict[str, Callable[[list[float], Mapping[str, Any]], list[float]]] = {
    "default": _unscaled,
    "llama3": _llama3,
}


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions. Has no parameter and nothing in the state dict."""

    inv_freq: Tensor  # [head_dim / 2], float64, whatever dtype the module is cast to

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self._make_inv_freq(torch.get_default_device()), persistent=False)

    def forward(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [n], integers -> cosine and sine [n, 1, head_dim / 2], in fp32 (float64 for dtype float64)."""
        angle = position[:, None, None] * self.inv_freq  # float64
        table_dtype = torch.promote_types(dtype, torch.float32)
        return angle.cos().to(table_dtype), angle.sin().to(table_dtype)

    def _make_inv_freq(self, device: torch.device) -> Tensor:
        return torch.tensor(frequencies(self.config), dtype=torch.float64, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # .to(torch.bfloat16) would round the frequencies, to_empty() would lose them: make them anew.
        super()._apply(fn, recurse)
        self.inv_freq = self._make_inv_freq(self.inv_freq.device)
        return self


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, backend: str = "auto") -> Tensor:
    """Turns every pair of x by its angle.

    Args:
        x: [total, heads, head_dim], head_dim even.
        cosine, sine: [total, 1, head_dim / 2], of `RotaryEmbedding`; they take no gradient.
        backend: as in `compressed_attention`.

    Returns:
        [total, heads, head_dim], dtype of x; computed in the dtype of cosine and rounded once.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value against the contract.
        RuntimeError: the chosen backend is not usable.
    """
    checks.check_choice("backend", backend, checks.BACKENDS)
    checks.check_tensors(x=x, cosine=cosine, sine=sine)
    turned: Tensor = getattr(torch.ops.fsa, _OP_NAMES[backend]).default(x, cosine, sine, False)
    return turned


# ---------------------------------------------------------------------------------------------------------------------
# The operators behind `rotate`; with `inverse` they turn back, which is the gradient
# ---------------------------------------------------------------------------------------------------------------------
_SCHEMA = "(Tensor x, Tensor cosine, Tensor sine, bool inverse) -> Tensor"
_OP_NAMES = {"auto": "rotate", "triton": "_rotate_triton", "reference": "_rotate_reference"}


def _forward(family: str, x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> Tensor:
    backend = checks.choose_backend(family, x, "RoPE")
    checks.check_rotation(x, cosine, sine, family)
    if backend == "reference":
        return _reference(x, cosine, sine, inverse)
    from . import triton_rope  # needs triton

    return triton_rope.rotate(as_kernel_input(x), cosine.contiguous(), sine.contiguous(), inverse)


def _reference(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    sign = -1 if inverse else 1
    # Products and sums in the dtype of the tables; rounded before they are joined, since that moves fewer bytes.
    turned_first = torch.addcmul(first * cosine, second, sine, value=-sign).to(x.dtype)
    turned_second = torch.addcmul(second * cosine, first, sine, value=sign).to(x.dtype)
    return torch.cat((turned_first, turned_second), dim=-1)


def _fake(family: str, x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> Tensor:
    checks.check_rotation(x, cosine, sine, family)
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosine, sine, ctx.inverse = inputs
    ctx.save_for_backward(cosine, sine)


def _autograd(op_name: str, ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    op = getattr(torch.ops.fsa, op_name).default
    return op(gradient, *ctx.saved_tensors, not ctx.inverse), None, None, None


for _family, _op_name in _OP_NAMES.items():
    register(_family, _op_name, Definition(_SCHEMA, _forward, _fake))
    register_gradient(_op_name, _autograd, _setup_context)
