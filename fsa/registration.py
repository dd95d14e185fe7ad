"""How operators are made known to torch. Each comes in families, one a backend and one that picks among them.

What a family computes, and what it says of shapes, differs in the backend alone: functions take the family first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# All operators of the package, those of fsa.module too, are defined in this one.
library = torch.library.Library("fsa", "DEF")


class Definition(NamedTuple):
    """What an operator is, whatever the family."""

    schema: str  # arguments and results, behind the name
    function: Callable[..., Any]  # (family, *arguments): computes the results
    fake: Callable[..., Any]  # the same, for shapes and dtypes alone


def register(family: str, op_name: str, definition: Definition, autocast: Callable[..., Any] | None = None) -> None:
    """Defines torch.ops.fsa.<op_name> for CPU and CUDA tensors, and for fake ones.

    Args:
        family: whose operator it is.
        op_name: its name.
        definition: what it is.
        autocast: (op_name, device type, *arguments), called where autocast is on. None: runs as without it.
    """
    library.define(op_name + definition.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type in ("CPU", "CUDA"):
        library.impl(op_name, functools.partial(definition.function, family), device_type)
        if autocast is not None:
            wrapper = functools.partial(autocast, op_name, device_type.lower())
            library.impl(op_name, wrapper, f"Autocast{device_type}")
    torch.library.register_fake(f"fsa::{op_name}", functools.partial(definition.fake, family), lib=library)


def register_gradient(op_name: str, gradient: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """The gradient of an operator, (op_name, ctx, *gradients), from what setup_context kept."""
    torch.library.register_autograd(
        f"fsa::{op_name}", functools.partial(gradient, op_name), setup_context=setup_context, lib=library
    )


def register_with_backward(
    family: str,
    op_name: str,
    forward: Definition,
    backward: Definition,
    gradient: Callable[..., Any],
    setup_context: Callable[..., None],
    *,
    what: str,
    autocast: Callable[..., Any] | None = None,
) -> None:
    """An operator and <op_name>_backward, which its gradient calls and which has none; what: the public function."""
    register(family, op_name, forward, autocast)
    register_gradient(op_name, gradient, setup_context)
    backward_name = f"{op_name}_backward"
    register(family, backward_name, backward)

    def refuse(ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError(
            f"{what} must be differentiated once, got a second derivative; do not pass create_graph=True"
        )

    torch.library.register_autograd(f"fsa::{backward_name}", refuse, lib=library)
