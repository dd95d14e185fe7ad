"""A mistake and what it says: the rows of docs/errors.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Bad:
    """A mistake and what it says."""

    mistake: str
    call: Callable[[], Any]
    error: type[Exception]
    message: str

    @property
    def changes(self) -> dict[str, Any]:
        """What the call changes in the arguments that are right."""
        changes: dict[str, Any] = self.call.changes  # type: ignore[attr-defined]
        return changes


def assert_raises(bad: Bad, call: Callable[[], Any]) -> None:
    """The exact type and the whole message."""
    with pytest.raises(bad.error) as caught:
        call()
    assert caught.type is bad.error
    assert str(caught.value) == bad.message
