"""Which blocks each query attends to: the public function, the operators behind it, and their twin in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..pipeline import as_kernel_input
from ..registration import Definition, register
from . import checks, cuda_selection
from .compressed_attention import keys_by_head, queries_by_head, resolve_scale, seen_windows
from .packed import packed_rows

_SCHEMA = (
    "(Tensor q, Tensor compressed_k, Tensor lse, Tensor cu_seqlens, Tensor compressed_cu_seqlens, int kernel_size, "
    "int kernel_stride, int block_size, int topk, int init_blocks, int local_blocks, float? softmax_scale) -> Tensor"
)
_OP_NAMES = {
    "auto": "select_blocks",
    "cuda": "_select_blocks_cuda",
    "triton": "_select_blocks_triton",
    "reference": "_select_blocks_reference",
}


def select_blocks(
    q: Tensor,
    compressed_k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    compressed_cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The topk blocks of keys that matter most to each query, by its attention to compressed keys.

    A query's probability of window w is exp(softmax_scale * q·k[w] - lse), as in `compressed_attention`, which decides
    what it sees. A block's score for a KV head is the sum, over the heads of the group and the windows, of the
    probability times how many of the window's kernel_size / kernel_stride chunks lie in the block. Source: Native
    Sparse Attention (arXiv 2502.11089), equations 8 to 10.

    The first `init_blocks` blocks of the sequence and the last `local_blocks` up to the query's own are always taken,
    blocks after its own never. The other slots go to the highest scores; of equal ones to the block that comes first.
    Scores are sums in fp32, so which of two nearly equal blocks is taken may differ from backend to backend.

    Args:
        q: [total, num_heads, head_dim], queries of all sequences one after the other.
        compressed_k: [max_windows, num_kv_heads, head_dim], dtype of q.
        lse: [num_heads, total], fp32 (float64 for float64 q), of `compressed_attention` of the same q.
        cu_seqlens, compressed_cu_seqlens: [batch + 1], int32, where tokens and windows of each sequence begin.
        kernel_size: tokens of a window, a multiple of kernel_stride, at most block_size.
        kernel_stride: tokens from one window's start to the next one's.
        block_size: keys of a block, 32, 64, 128 or 256, a multiple of kernel_stride.
        topk: slots, init_blocks + local_blocks to 512.
        init_blocks, local_blocks: how many blocks are taken without regard to scores.
        softmax_scale: as in `compressed_attention`.
        backend: as in `compressed_attention`, or "cuda", which "auto" takes where it can: on a GPU of compute
            capability 9.0, for fp16 and bf16, and blocks of 4, 8 or 16 strides.

    Deterministic. There is no gradient. Nothing waits for the GPU.

    Returns:
        topk_idx: [num_kv_heads, total, topk], int32, as `fsa.selected_attention` takes it: ascending block ids, counted
            from the start of the query's sequence; slots for which there is no block hold -1 and come last.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value against the contract.
        RuntimeError: the chosen backend is not usable.
    """
    checks.check_choice("backend", backend, checks.CUDA_BACKENDS)
    checks.check_tensors(
        q=q, compressed_k=compressed_k, lse=lse, cu_seqlens=cu_seqlens, compressed_cu_seqlens=compressed_cu_seqlens
    )
    checks.check_windows(kernel_size, kernel_stride)
    checks.check_selection(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    op = getattr(torch.ops.fsa, _OP_NAMES[backend]).default
    topk_idx: Tensor = op(
        q.detach(), compressed_k.detach(), lse.detach(), cu_seqlens, compressed_cu_seqlens,
        kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, softmax_scale,
    )  # fmt: skip
    return topk_idx


def _check(family: str, values: tuple[Any, ...]) -> None:
    q, compressed_k, lse, cu_seqlens, compressed_cu_seqlens, *sizes, softmax_scale = values
    checks.check_windows(*sizes[:2])
    checks.check_selection(*sizes)
    checks.check_compressed(q, compressed_k, compressed_k, cu_seqlens, compressed_cu_seqlens, softmax_scale, family)
    checks.check_lse(q, lse)


def _choose_backend(family: str, q: Tensor, kernel_stride: int, block_size: int) -> str:
    """The backend that runs the selection; raises if the one asked for cannot."""
    if family not in ("auto", "cuda") or not backends.status("cuda", q.device).usable:
        return checks.choose_backend(family, q, "block selection")
    obstacle = cuda_selection.obstacle(q.device, kernel_stride, block_size)
    if family == "cuda" and obstacle:
        raise RuntimeError(f"backend must have kernels for the selection, got backend='cuda': {obstacle}; use 'auto'")
    has_kernels = not obstacle and q.dtype in backends.DTYPES["cuda"]
    return checks.choose_backend(family, q, "block selection", ("cuda", "triton") if has_kernels else ("triton",))


def _forward(family: str, *values: Any) -> Tensor:
    q, compressed_k, lse, *rest = values
    backend = _choose_backend(family, q, kernel_stride=values[6], block_size=values[7])
    _check(family, values)
    arguments = resolve_scale(q, rest)
    if backend == "reference":
        return _reference(q, compressed_k, lse, *arguments)
    q, compressed_k, lse = as_kernel_input(q), as_kernel_input(compressed_k), lse.contiguous()
    if backend == "cuda":
        return cuda_selection.select_blocks(q, compressed_k, lse, *arguments)
    from . import triton_selection  # needs triton

    return triton_selection.select_blocks(q, compressed_k, lse, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The twin
# ---------------------------------------------------------------------------------------------------------------------
def _reference(
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
    num_kv_heads, total = compressed_k.shape[1], q.shape[0]
    position = packed_rows(cu_seqlens, total).position
    own_block = torch.div(position, block_size, rounding_mode="floor")  # [total], -1 in no sequence
    # A query that sees no window stands in block 0, since a window is no longer than a block.
    topk_idx = torch.full((num_kv_heads, total, topk), -1, dtype=torch.int32, device=q.device)
    topk_idx[..., 0] = own_block.clamp(max=0)
    queries, k = queries_by_head(q, num_kv_heads), keys_by_head(compressed_k)
    log_sums = queries_by_head(lse.T.unsqueeze(-1), num_kv_heads)
    for seen in seen_windows(q, compressed_k, cu_seqlens, compressed_cu_seqlens, kernel_size, kernel_stride):
        own = own_block[seen.queries]
        # Reading is free on the CPU; elsewhere it would wait for the device.
        num_blocks = int(own.max()) + 1 if q.device.type == "cpu" else total // block_size + 1
        probs = torch.exp(seen.scores(queries, k, softmax_scale) - log_sums[:, seen.queries])
        probs = torch.where(seen.visible, probs, 0).sum(2)  # [num_kv_heads, n, w]
        chunks = seen.position[:, None] + torch.arange(kernel_size // kernel_stride, device=q.device)  # [w, places]
        block = torch.arange(num_blocks, device=q.device)
        overlap = (chunks[..., None] // (block_size // kernel_stride) == block).sum(1)  # [w, num_blocks]
        scores = probs @ overlap.to(probs.dtype)
        topk_idx[:, seen.queries] = take_highest(scores, own, topk, init_blocks, local_blocks)
    return topk_idx


def take_highest(scores: Tensor, own_block: Tensor, topk: int, init_blocks: int, local_blocks: int) -> Tensor:
    """Rows of topk_idx from scores of all blocks.

    Args:
        scores: [num_kv_heads, n, num_blocks]; NaN counts as 0.
        own_block: [n], the block in which each query stands, below num_blocks; -1 in no sequence.
        topk, init_blocks, local_blocks: as in `select_blocks`.

    Returns:
        [num_kv_heads, n, topk], int32.
    """
    num_blocks = scores.shape[-1]
    block, own = torch.arange(num_blocks, device=scores.device), own_block[:, None]
    forced = (block < init_blocks) | (block > own - local_blocks)
    scores = torch.where(forced, torch.inf, scores.nan_to_num(nan=0.0))
    scores = torch.where(block <= own, scores, -torch.inf)
    # Stable: equal scores stay in ascending order of blocks.
    highest, taken = (x[..., :topk] for x in scores.sort(dim=-1, descending=True, stable=True))
    ascending = torch.where(highest == -torch.inf, num_blocks, taken).sort(dim=-1).values
    unused = topk - ascending.shape[-1]
    return nn.functional.pad(torch.where(ascending == num_blocks, -1, ascending), (0, unused), value=-1).int()


# ---------------------------------------------------------------------------------------------------------------------
# Fake, autocast
# ---------------------------------------------------------------------------------------------------------------------
def _fake(family: str, *values: Any) -> Tensor:
    _check(family, values)
    q, compressed_k, topk = values[0], values[1], values[8]
    return q.new_empty((compressed_k.shape[1], q.shape[0], topk), dtype=torch.int32)


def _autocast(op_name: str, device_type: str, *values: Any) -> Tensor:
    dtype = torch.get_autocast_dtype(device_type)
    tensors = (x if x.dtype == torch.float64 else x.to(dtype) for x in values[:2])
    with torch.autocast(device_type, enabled=False):
        topk_idx: Tensor = getattr(torch.ops.fsa, op_name).default(*tensors, *values[2:])
    return topk_idx


for _family, _op_name in _OP_NAMES.items():
    register(_family, _op_name, Definition(_SCHEMA, _forward, _fake), _autocast)
