"""Every error message. docs/errors.md is this table; `PYTHONPATH=tests python -m test_errors` writes it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from backend_errors import BACKENDS
from errors import Bad, assert_raises
from module_errors import MODULE, MODULE_PARTS
from op_errors import QKV, SELECTION, SEQUENCES, TYPES, right_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from validation_errors import VALIDATION
from workspace_errors import WORKSPACE

import fsa
from fsa import backends
from fsa.problem import Arguments

OPERATORS = (
    "selected_attention",
    "_selected_attention_cuda",
    "_selected_attention_triton",
    "_selected_attention_reference",
)
PAGE = Path(__file__).parents[1] / "docs" / "errors.md"

_INTRODUCTION = """# Errors

Every message says argument, rule, actual value and remedy. Argument errors are raised on the host before anything is
launched, the same for every backend; under `torch.compile` they appear, inside its own error, when the function is
traced.

What a tensor holds cannot be checked without waiting for the GPU, and the op never waits. So these are **not** reported
by the op, and never lead out of bounds:

- `topk_idx`: a block beyond the token's sequence, a negative id, or a block that the causal mask hides counts as
  unused; a block listed twice counts twice.
- `cu_seqlens_q`, `cu_seqlens_k`: each bound is clamped to the number of tokens, a negative length counts as zero.
  Tokens outside of all sequences attend to nothing (out = 0, lse = -inf, gradients 0). If bounds decrease, which of
  the sequences a token belongs to is not specified.

`fsa.check_topk_idx` is the explicit check of both; it waits for the GPU. NaN and infinities in q, k and v follow IEEE
rules and reach only queries that see them.
"""

SECTIONS = {
    "Python types": TYPES,
    "q, k and v": QKV,
    "The selection": SELECTION,
    "Sequences and devices": SEQUENCES,
    "Backends and gradients": BACKENDS,
    "Workspace": WORKSPACE,
    "`fsa.check_topk_idx`": VALIDATION,
    "`fsa.FlashSparseAttention`": MODULE,
    "The module's parts": MODULE_PARTS,
}
ALL = [bad for section in SECTIONS.values() for bad in section]
# What the function alone says (no cu_seqlens_k), and the one message that names the backend, apart.
OF_THE_OPERATORS = [
    bad
    for bad in (*QKV, *SELECTION, *SEQUENCES)
    if "cu_seqlens_k must be given" not in bad.message and "with backend=" not in bad.message
]


def errors_page() -> str:
    """docs/errors.md."""
    parts = [_INTRODUCTION]
    for title, section in SECTIONS.items():
        rows = "\n".join(f"| {bad.mistake} | {bad.error.__name__} | `{bad.message}` |" for bad in section)
        parts.append(f"## {title}\n\n| mistake | error | message |\n| --- | --- | --- |\n{rows}\n")
    return "\n".join(parts)


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.mistake)
def test_message(bad: Bad) -> None:
    assert_raises(bad, bad.call)


def test_the_page_shows_every_message() -> None:
    assert PAGE.read_text() == errors_page(), "run: PYTHONPATH=tests python -m test_errors"


def test_the_right_call_passes() -> None:
    fsa.selected_attention(**right_arguments())


@pytest.mark.parametrize("bad", OF_THE_OPERATORS, ids=lambda bad: bad.mistake)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_check_as_the_function_does(name: str, bad: Bad) -> None:
    """Called directly or traced with fake tensors: no backend is without the checks."""
    given = {"block_size": 64, "softmax_scale": None, "causal": True} | right_arguments() | bad.changes
    given.setdefault("cu_seqlens_k", given["cu_seqlens_q"])
    arguments = Arguments(**given)
    operator = getattr(torch.ops.fsa, name)

    with mock.patch.object(backends, "require"):
        assert_raises(bad, lambda: operator(*arguments))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        assert_raises(bad, lambda: operator(*fakes))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(errors_page())
