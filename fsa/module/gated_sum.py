"""The gated sum of the three branches: the public function, the operators behind it, and their twin in plain PyTorch.

`torch.ops.fsa.gated_sum` picks the backend by device; `_gated_sum_triton` and `_gated_sum_reference` are one backend
each. Each has a backward operator, `<name>_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pipeline import as_kernel_input
from ..registration import Definition, register_with_backward
from . import checks

_FORWARD_SCHEMA = "(Tensor gates, Tensor compressed, Tensor selected, Tensor sliding) -> Tensor"
_BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor gates, Tensor compressed, Tensor selected, Tensor sliding) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_OP_NAMES = {"auto": "gated_sum", "triton": "_gated_sum_triton", "reference": "_gated_sum_reference"}


def gated_sum(gates: Tensor, compressed: Tensor, selected: Tensor, sliding: Tensor, *, backend: str = "auto") -> Tensor:
    """The branches, each times its gate, added up: Native Sparse Attention (arXiv 2502.11089), equation 5.

    Args:
        gates: [total, 3], one a token and branch, or [total, 3 * num_heads], all heads of a branch in a row.
        compressed, selected, sliding: [total, num_heads, head_dim], what the branches return, alike in dtype.
        backend: as in `compressed_attention`.

    Gradients flow to all four, once. Deterministic; no result is added up by atomics.

    Returns:
        [total, num_heads, head_dim], dtype of the branches.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value against the contract.
        RuntimeError: the chosen backend is not usable.
    """
    checks.check_choice("backend", backend, checks.BACKENDS)
    checks.check_tensors(gates=gates, compressed=compressed, selected=selected, sliding=sliding)
    out: Tensor = getattr(torch.ops.fsa, _OP_NAMES[backend]).default(gates, compressed, selected, sliding)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Implementations
# ---------------------------------------------------------------------------------------------------------------------
def _forward(family: str, gates: Tensor, *branches: Tensor) -> Tensor:
    backend = checks.choose_backend(family, branches[0], "the gated sum")
    checks.check_gated_sum(gates, branches, family)
    if backend == "reference":
        return _reference_forward(gates, *branches)
    from . import triton_gated_sum  # needs triton

    return triton_gated_sum.forward(*(x.contiguous() for x in (gates, *branches)))


def _backward(family: str, dout: Tensor, gates: Tensor, *branches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = checks.choose_backend(family, branches[0], "the gated sum")
    checks.check_gated_sum(gates, branches, family)
    checks.check_dout(dout, branches[0])
    if backend == "reference":
        return _reference_backward(dout, gates, *branches)
    from . import triton_gated_sum  # needs triton

    return triton_gated_sum.backward(as_kernel_input(dout), *(x.contiguous() for x in (gates, *branches)))


def _by_branch(gates: Tensor) -> tuple[Tensor, ...]:
    """Three of [total, 1 or num_heads, 1]."""
    return gates.unflatten(-1, (3, -1))[..., None].unbind(1)


def _reference_forward(gates: Tensor, compressed: Tensor, selected: Tensor, sliding: Tensor) -> Tensor:
    gate = _by_branch(gates)  # may be of a wider dtype than the branches: products and sums are, too
    out = gate[0] * compressed + gate[1] * selected
    return (out + gate[2] * sliding).to(compressed.dtype).contiguous()


def _reference_backward(
    dout: Tensor, gates: Tensor, compressed: Tensor, selected: Tensor, sliding: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(dout.dtype, torch.float32)
    a_token = gates.shape[1] == 3
    dgates = []
    for branch in (compressed, selected, sliding):
        sums = (dout.to(compute) * branch).sum(-1)  # [total, num_heads]
        dgates.append(sums.sum(-1, keepdim=True) if a_token else sums)
    dcompressed, dselected, dsliding = ((gate * dout).to(dout.dtype).contiguous() for gate in _by_branch(gates))
    return torch.cat(dgates, -1).to(gates.dtype), dcompressed, dselected, dsliding


# ---------------------------------------------------------------------------------------------------------------------
# Fake, autograd
# ---------------------------------------------------------------------------------------------------------------------
def _forward_fake(family: str, gates: Tensor, *branches: Tensor) -> Tensor:
    checks.check_gated_sum(gates, branches, family)
    return branches[0].new_empty(branches[0].shape)


def _backward_fake(
    family: str, dout: Tensor, gates: Tensor, *branches: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.check_gated_sum(gates, branches, family)
    checks.check_dout(dout, branches[0])
    dgates, dcompressed, dselected, dsliding = (x.new_empty(x.shape) for x in (gates, *branches))
    return dgates, dcompressed, dselected, dsliding


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(op_name: str, ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = getattr(torch.ops.fsa, f"{op_name}_backward").default(dout, *ctx.saved_tensors)
    return gradients


for _family, _op_name in _OP_NAMES.items():
    register_with_backward(
        _family,
        _op_name,
        Definition(_FORWARD_SCHEMA, _forward, _forward_fake),
        Definition(_BACKWARD_SCHEMA, _backward, _backward_fake),
        _autograd,
        _setup_context,
        what="gated_sum",
    )
