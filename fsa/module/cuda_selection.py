"""Selection of blocks on the compiled kernels: scores of a chunk of query tokens into a workspace, then their top-k.

The extension implements the private ops whose schemas stand here; `fsa.backends` loads it first. csrc/README.md has the
stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import kernel_arch
from ..pipeline import without_zero_strides
from .score_chunks import empty_scores, plan_chunks

_library = torch.library.Library("fsa", "FRAGMENT")
_CHUNK = "int query_begin, int query_end"
_library.define(
    "_block_scores(Tensor q, Tensor compressed_k, Tensor lse, Tensor cu_seqlens, Tensor compressed_cu_seqlens, "
    f"{_CHUNK}, int kernel_size, int kernel_stride, int block_size, float softmax_scale, Tensor(a!) scores) -> ()"
)
_library.define(
    f"_select_topk(Tensor scores, Tensor cu_seqlens, {_CHUNK}, int block_size, int init_blocks, int local_blocks, "
    "Tensor(a!) topk_idx) -> ()"
)
_TILE_Q = 64  # query tokens that the scores are computed for at a time
_RATIOS = (4, 8, 16)  # strides of a block; csrc/dispatch.h, has_block_scores


def obstacle(device: torch.device, kernel_stride: int, block_size: int) -> str:
    """Why these kernels cannot run, or nothing. The extension and its dtypes are the caller's to look at."""
    if kernel_arch(device) < 90:
        return "block scores have CUDA kernels for compute capability 9.0 alone, where built for it and not capped"
    if block_size not in (ratio * kernel_stride for ratio in _RATIOS):
        return (
            f"block scores have CUDA kernels for blocks of {', '.join(map(str, _RATIOS[:-1]))} or {_RATIOS[-1]} strides"
        )
    return ""


def select_blocks(
    q: Tensor,
    compressed_k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    compressed_cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float,
) -> Tensor:
    """The blocks with the largest sums of attention probabilities; arguments and results as in `triton_selection`.

    q is fp16 or bf16. Beside topk_idx 64 MiB are allocated at most, or the scores of 64 query tokens if that is more,
    and copies of what is expanded.
    """
    total, num_kv_heads, max_windows = q.shape[0], compressed_k.shape[1], compressed_k.shape[0]
    topk_idx = torch.empty((num_kv_heads, total, topk), dtype=torch.int32, device=q.device)
    if total == 0:
        return topk_idx
    q, compressed_k = without_zero_strides(q), without_zero_strides(compressed_k)
    chunks = plan_chunks(total, num_kv_heads, block_size, _TILE_Q)
    workspace = empty_scores(chunks, num_kv_heads, q.device)
    with torch.cuda.device_of(q):
        for chunk in chunks:
            shape = torch.Size((chunk.end - chunk.begin, num_kv_heads, chunk.stride))
            scores = workspace[: shape.numel()].view(shape)
            if max_windows == 0:
                scores.zero_()
            else:
                torch.ops.fsa._block_scores(
                    q, compressed_k, lse, cu_seqlens, compressed_cu_seqlens, chunk.begin, chunk.end, kernel_size,
                    kernel_stride, block_size, softmax_scale, scores,
                )  # fmt: skip
            torch.ops.fsa._select_topk(
                scores, cu_seqlens, chunk.begin, chunk.end, block_size, init_blocks, local_blocks, topk_idx
            )
    return topk_idx
