"""Flash Sparse Attention: Native Sparse Attention as a module, its selected branch with hand-written CUDA kernels."""

from .backends import info
from .module import FlashSparseAttention, RopeConfig
from .ops import selected_attention
from .validation import check_topk_idx
from .workspace import get_workspace_limit, set_workspace_limit

__version__ = "0.1.0"

__all__ = [
    "FlashSparseAttention",
    "RopeConfig",
    "__version__",
    "check_topk_idx",
    "get_workspace_limit",
    "info",
    "selected_attention",
    "set_workspace_limit",
]
