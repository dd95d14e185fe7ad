"""How operators are made known to torch: the registrations that every family of every operator has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("fsa", "DEF")


def register(
    op_name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    autocast: Callable[..., Any] | None = None,
) -> None:
    """Defines torch.ops.fsa.<op_name> for CPU and CUDA tensors, and for fake ones.

    Args:
        op_name: of the operator.
        schema: arguments and results, behind the name.
        function: computes the results; picks the backend by itself.
        fake: the same, for shapes and dtypes alone.
        autocast: called with the device type and the arguments where autocast is on. None: runs as without it.
    """
    library.define(op_name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type in ("CPU", "CUDA"):
        library.impl(op_name, function, device_type)
        if autocast is not None:
            library.impl(op_name, functools.partial(autocast, device_type.lower()), f"Autocast{device_type}")
    torch.library.register_fake(f"fsa::{op_name}", fake, lib=library)


def register_gradient(op_name: str, gradient: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """The gradient of an operator, from what setup_context kept."""
    torch.library.register_autograd(f"fsa::{op_name}", gradient, setup_context=setup_context, lib=library)


def refuse_second_derivative(backward_name: str, what: str) -> None:
    """A backward operator that is not differentiated; the message calls the function `what`."""

    def refuse(ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError(
            f"{what} must be differentiated once, got a second derivative; do not pass create_graph=True"
        )

    torch.library.register_autograd(f"fsa::{backward_name}", refuse, lib=library)
