"""The shapes that benchmarks measure, in named lists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .selections import PATTERNS


@dataclass(frozen=True)
class Shape:
    """One causal sequence and its selection."""

    SELECTIONS: ClassVar[tuple[str, ...]] = PATTERNS

    tokens: int
    num_kv_heads: int
    group_size: int
    block_size: int
    topk: int
    selection: str = "random"
    head_dim: int = 128
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError for what the op or the generator does not take."""
        sizes = (self.tokens, self.num_kv_heads, self.group_size)
        if min(sizes) < 1 or not 1 <= self.topk <= 512 or self.head_dim % 8 or not 8 <= self.head_dim <= 256:
            raise ValueError(f"not a shape of selected attention: {self}")
        if self.block_size not in (32, 64, 128, 256) or self.selection not in self.SELECTIONS:
            raise ValueError(f"unknown block_size or selection: {self}")
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype must be float16 or bfloat16: {self}")

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group_size

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of q, k and v."""
        return torch.float16 if self.dtype == "float16" else torch.bfloat16

    def __str__(self) -> str:
        """One line that tells this shape from the others."""
        parts = [
            f"{self.tokens} tokens, {self.num_kv_heads} x {self.group_size} heads, d {self.head_dim}",
            f"block {self.block_size}, top {self.topk}, {self.selection}",
        ]
        return ", ".join(parts) + (f", {self.dtype}" if self.dtype != "bfloat16" else "")


@dataclass(frozen=True)
class ModuleShape(Shape):
    """One causal sequence in the NSA module, which selects blocks itself."""

    SELECTIONS: ClassVar[tuple[str, ...]] = ("own",)

    block_size: int = 64
    topk: int = 16
    selection: str = "own"
    kernel_size: int = 32
    kernel_stride: int = 16
    window_size: int = 512

    def __str__(self) -> str:
        """One line that tells this shape from the others."""
        windows = f"windows {self.kernel_size}/{self.kernel_stride}, sliding {self.window_size}"
        return super().__str__().replace(self.selection, windows, 1)


_LONG = Shape(tokens=65536, num_kv_heads=4, group_size=1, block_size=64, topk=16)
_GROUPS = tuple(replace(_LONG, group_size=group) for group in (1, 2, 4, 8, 16))
_GROUP_4 = replace(_LONG, group_size=4)

SHAPES: dict[str, tuple[Shape, ...]] = {
    # A minute at most: whether anything changed.
    "quick": (
        replace(_LONG, tokens=16384),
        replace(_GROUP_4, tokens=16384),
        replace(_GROUP_4, tokens=16384, selection="trained"),
    ),
    # What the project is judged by.
    "targets": (
        *_GROUPS,
        Shape(tokens=65536, num_kv_heads=4, group_size=4, block_size=128, topk=8),
        Shape(tokens=65536, num_kv_heads=4, group_size=16, block_size=128, topk=16),
        Shape(tokens=8192, num_kv_heads=8, group_size=4, block_size=64, topk=16),
        Shape(tokens=32768, num_kv_heads=32, group_size=1, block_size=64, topk=16),
        replace(_LONG, selection="trained"),
        replace(_GROUP_4, selection="trained"),
        replace(_GROUP_4, selection="sink"),
        replace(_LONG, group_size=16, selection="coherent"),
    ),
    # One axis at a time, from the same middle.
    "selections": tuple(replace(_GROUP_4, selection=pattern) for pattern in PATTERNS),
    "groups": _GROUPS,
    "tokens": tuple(replace(_GROUP_4, tokens=2**n) for n in range(12, 18)),
    "blocks": tuple(
        replace(_GROUP_4, block_size=b, topk=k) for b, k in ((32, 32), (64, 16), (128, 8), (128, 16), (256, 4))
    ),
    "head_dims": tuple(replace(_GROUP_4, head_dim=head_dim) for head_dim in (64, 128, 256)),
    "dtypes": tuple(replace(_GROUP_4, dtype=dtype) for dtype in ("bfloat16", "float16")),
}

_MODULE = ModuleShape(tokens=65536, num_kv_heads=4, group_size=4)

MODULE_SHAPES: dict[str, tuple[ModuleShape, ...]] = {
    "quick": (replace(_MODULE, tokens=16384),),
    "groups": tuple(replace(_MODULE, group_size=group) for group in (1, 4, 16)),
    "tokens": tuple(replace(_MODULE, tokens=2**n) for n in range(13, 18)),
}
