"""Errors of the workspace limit; test_errors.py runs them and writes docs/errors.md."""

from __future__ import annotations

import os
from unittest import mock

import torch
from errors import Bad

import fsa
from fsa import workspace
from fsa.buffers import Sizes
from fsa.chunks import chunk_grids

_SIZES = Sizes(
    total_q=4096,
    total_k=4096,
    num_blocks=65,
    num_kv_heads=2,
    group_size=4,
    head_dim=128,
    topk=16,
    block_size=64,
    dtype=torch.bfloat16,
    num_sms=132,
)


def _limit_in_environment() -> None:
    with mock.patch.dict(os.environ, FSA_WORKSPACE_LIMIT_MIB="1G"):
        workspace._limit_from_environment()


WORKSPACE = [
    Bad(
        "a workspace limit below one query (here 10,000 bytes)",
        lambda: chunk_grids(_SIZES, "forward", 10_000),
        RuntimeError,
        "workspace limit must hold one query of one KV head, in the forward of this call 18816 bytes, got 10000 bytes; "
        "raise it with fsa.set_workspace_limit(18816) or FSA_WORKSPACE_LIMIT_MIB",
    ),
    Bad(
        "`fsa.set_workspace_limit(1e9)`",
        lambda: fsa.set_workspace_limit(1e9),  # type: ignore[arg-type]
        TypeError,
        "limit must be an int (bytes), got float; pass e.g. 512 * 2**20",
    ),
    Bad(
        "`fsa.set_workspace_limit(0)`",
        lambda: fsa.set_workspace_limit(0),
        ValueError,
        "limit must be positive (bytes), got 0; pass e.g. 512 * 2**20",
    ),
    Bad(
        "`FSA_WORKSPACE_LIMIT_MIB=1G`, when fsa is imported",
        _limit_in_environment,
        ValueError,
        "FSA_WORKSPACE_LIMIT_MIB must be a positive whole number of MiB, got '1G'; unset it or set e.g. 1024",
    ),
]
