"""The workspace limit: what a call may allocate beyond its outputs. `fsa.chunks` keeps to it."""

from __future__ import annotations

import os

# At 65,536 tokens within 5 % of no limit; 1 GiB is within 7 % (docs/performance.md). Partials of usual shapes are a
# power of two, and what else a chunk needs comes on top.
_DEFAULT_LIMIT = 2560 << 20


def _limit_from_environment() -> int:
    text = os.environ.get("FSA_WORKSPACE_LIMIT_MIB")
    if text is None:
        return _DEFAULT_LIMIT
    if not text.strip().isdecimal() or int(text) == 0:
        raise ValueError(
            f"FSA_WORKSPACE_LIMIT_MIB must be a positive whole number of MiB, got {text!r}; unset it or set e.g. 1024"
        )
    return int(text) << 20


_limit = _limit_from_environment()  # one int: reading and rebinding it is atomic, so threads need no lock


def get_workspace_limit() -> int:
    """Bytes that a call may allocate beyond its outputs (default 2.5 GiB, or FSA_WORKSPACE_LIMIT_MIB at import)."""
    return _limit


def set_workspace_limit(limit: int) -> None:
    """Sets the bytes that a call may allocate beyond its outputs, for all threads and devices of the process.

    A smaller limit cuts a call into more chunks, which costs time but changes no more than rounding: of dk and dv, and,
    where blocks are shared (csrc/README.md), of out and lse.
    CUDA and Triton only: the reference backend bounds its own chunks.

    Raises:
        TypeError: limit is not an int.
        ValueError: limit is not positive.
    """
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit must be an int (bytes), got {type(limit).__name__}; pass e.g. 512 * 2**20")
    if limit <= 0:
        raise ValueError(f"limit must be positive (bytes), got {limit}; pass e.g. 512 * 2**20")
    global _limit
    _limit = limit
