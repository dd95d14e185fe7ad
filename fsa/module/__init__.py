"""The Native Sparse Attention module around selected attention; one concept a file."""

from .fsa import FlashSparseAttention
from .rope import RopeConfig

__all__ = ["FlashSparseAttention", "RopeConfig"]
