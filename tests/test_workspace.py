"""The workspace limit: what sets it, and what it starts with."""

from __future__ import annotations

import pytest

import fsa
from fsa import workspace


def test_set_workspace_limit(workspace_limit: None) -> None:
    fsa.set_workspace_limit(123 << 20)
    assert fsa.get_workspace_limit() == 123 << 20


def test_limit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSA_WORKSPACE_LIMIT_MIB", raising=False)
    assert workspace._limit_from_environment() == 2560 << 20
    monkeypatch.setenv("FSA_WORKSPACE_LIMIT_MIB", "256")
    assert workspace._limit_from_environment() == 256 << 20
