"""The host side of selected attention, one for every backend with stages: chunks, buffers, and the stage calls.

A stages module (`fsa.stages_cuda`, `triton_ref.stages`) has plan, forward_main, forward_reduce, backward_preprocess,
backward_main and backward_reduce, and shares_blocks, which says of a problem whether there are forward_split and
forward_shared, too. Arguments are checked before they come here; nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType

import torch
from torch import Tensor

from . import buffers
from .buffers import Sizes
from .chunks import chunk_grids, may_share_blocks
from .problem import ChunkGrid, Problem
from .tiling import forward_min_rest, sharing_run
from .workspace import get_workspace_limit


def forward(problem: Problem, stages: ModuleType) -> tuple[Tensor, Tensor]:
    """Selected attention.

    Returns:
        out: [total_q, num_heads, head_dim], dtype of q, contiguous.
        lse: [num_heads, total_q], fp32, natural log.
    """
    q = problem.q
    if problem.total_q == 0 or problem.total_k == 0:
        return q.new_zeros(q.shape), q.new_full((problem.num_heads, problem.total_q), -torch.inf, dtype=torch.float32)

    out = q.new_empty(q.shape)
    lse = q.new_empty((problem.num_heads, problem.total_q), dtype=torch.float32)
    limit = get_workspace_limit()
    shares_blocks = stages.shares_blocks(problem) and may_share_blocks(Sizes.of(problem), limit)
    sizes = Sizes.of(problem, shares_blocks)
    if shares_blocks:
        problem = dataclasses.replace(problem, k=without_zero_strides(problem.k), v=without_zero_strides(problem.v))
    with torch.cuda.device_of(q):
        scattered_idx = torch.empty_like(problem.topk_idx) if shares_blocks else None
        for grid in chunk_grids(sizes, "forward", limit):
            _forward_chunks(problem, stages, grid, sizes, limit, scattered_idx, out, lse)
    return out, lse


def backward(
    problem: Problem, stages: ModuleType, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each with the shape and dtype of its input, contiguous.

    Args:
        problem: as in the forward.
        stages: the stages module.
        out, lse: what the forward returned.
        dout: [total_q, num_heads, head_dim], gradient of out, or None for zero.
        dlse: [num_heads, total_q], gradient of lse, or None for zero.
    """
    q, k = problem.q, problem.k
    dk, dv = k.new_zeros(k.shape), k.new_zeros(k.shape)
    if problem.total_q == 0 or problem.total_k == 0:
        return q.new_zeros(q.shape), dk, dv

    dq = q.new_empty(q.shape)
    delta = q.new_empty((problem.num_heads, problem.total_q), dtype=torch.float32)
    # A zero dout takes no memory: one row, expanded.
    dout = as_kernel_input(q.new_zeros(problem.head_dim).expand(q.shape) if dout is None else dout)
    lse = lse.contiguous()
    sizes, limit = Sizes.of(problem), get_workspace_limit()
    grids = chunk_grids(sizes, "backward", limit)
    with torch.cuda.device_of(q):
        stages.backward_preprocess(as_kernel_input(out), dout, None if dlse is None else dlse.contiguous(), delta)
        # Chunks of several query ranges add up in fp32; a chunk that has all queries writes its gradients at once.
        accumulate = grids[0].chunk_queries < problem.total_q
        for (head_begin, head_end), same_heads in itertools.groupby(grids, lambda g: (g.head_begin, g.head_end)):
            dk_heads, dv_heads = dk[:, head_begin:head_end], dv[:, head_begin:head_end]
            dk_sum = torch.zeros_like(dk_heads, dtype=torch.float32) if accumulate else dk_heads
            dv_sum = torch.zeros_like(dv_heads, dtype=torch.float32) if accumulate else dv_heads
            for grid in same_heads:
                _backward_chunks(problem, stages, grid, sizes, limit, dout, lse, delta, dq, dk_sum, dv_sum, accumulate)
            if accumulate:
                dk_heads.copy_(dk_sum)
                dv_heads.copy_(dv_sum)
            del dk_sum, dv_sum  # before the next heads get theirs
    return dq, dk, dv


def as_kernel_input(tensor: Tensor) -> Tensor:
    """The tensor itself if kernels can read it: last dimension contiguous, rows aligned to 16 bytes; else a copy.

    Strides of zero (an expanded gradient) are read in place, except along the last dimension.
    """
    aligned = tensor.data_ptr() % 16 == 0 and all(
        stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1]
    )
    return tensor if aligned and tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def without_zero_strides(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where a dimension is expanded: Hopper's copy engine does not read such."""
    return tensor.clone(memory_format=torch.contiguous_format) if 0 in tensor.stride() else tensor


def _forward_chunks(
    problem: Problem,
    stages: ModuleType,
    grid: ChunkGrid,
    sizes: Sizes,
    limit: int,
    scattered_idx: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """The stages of some chunks; with `scattered_idx`, blocks that neighbouring queries share are attended to apart."""
    chunks = grid.chunks
    last_stage = stages.forward_reduce
    of_split: list[dict[str, Tensor]] = [{} for _ in chunks]
    if scattered_idx is not None:
        last_stage = stages.forward_shared
        of_split = _split(problem, stages, grid, sizes, scattered_idx)
        problem = dataclasses.replace(problem, topk_idx=scattered_idx)
    per_item = buffers.edges_per_item(sizes, "forward", chunks[0].num_heads, chunks[0].num_queries, limit)
    num_ranges = buffers.query_ranges(sizes, "forward", chunks[0].num_queries)
    plans = stages.plan(problem, grid, per_item, num_ranges, forward_min_rest(per_item))
    for chunk, plan, shared in zip(chunks, plans, of_split, strict=True):
        specs = buffers.forward_buffers(sizes, chunk.num_heads, chunk.num_queries)
        partials = {name: spec.empty(problem.q.device) for name, spec in specs.items()}
        stages.forward_main(problem, chunk, plan, **partials)
        last_stage(problem, chunk, **shared, **partials, out=out, lse=lse)
        del partials  # before the next chunk gets its own


def _split(
    problem: Problem, stages: ModuleType, grid: ChunkGrid, sizes: Sizes, scattered_idx: Tensor
) -> list[dict[str, Tensor]]:
    """What forward_split hands to forward_shared, by chunk; the rest of the selection is left in `scattered_idx`."""
    specs = [buffers.shared_buffers(sizes, chunk.num_heads, chunk.num_queries) for chunk in grid.chunks]
    together, of_chunks = buffers.allocate_together(specs, problem.q.device)
    run = sharing_run(problem.group_size, problem.block_size)
    heads_of_all = {name: tensor.flatten(0, 1) for name, tensor in together.items()}
    stages.forward_split(problem, grid, *run, scattered_idx, **heads_of_all)
    return of_chunks


def _backward_chunks(
    problem: Problem,
    stages: ModuleType,
    grid: ChunkGrid,
    sizes: Sizes,
    limit: int,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
) -> None:
    """The stages of some chunks; `dk` and `dv` have the heads of all of them."""
    chunks = grid.chunks
    per_item = buffers.edges_per_item(sizes, "backward", chunks[0].num_heads, chunks[0].num_queries, limit)
    for chunk, plan in zip(chunks, stages.plan(problem, grid, per_item), strict=True):
        heads = slice(chunk.head_begin - grid.head_begin, chunk.head_end - grid.head_begin)
        specs = buffers.backward_buffers(sizes, chunk.num_heads, chunk.num_queries, per_item)
        dq_partial, dkv_pieces = (specs[name].empty(problem.q.device) for name in ("dq_partial", "dkv_pieces"))
        gradients = dk[:, heads], dv[:, heads]
        stages.backward_main(problem, chunk, plan, dout, lse, delta, dq_partial, *gradients, dkv_pieces, accumulate)
        stages.backward_reduce(problem, chunk, plan, dq_partial, dkv_pieces, dq, *gradients, accumulate)
        del dq_partial, dkv_pieces  # before the next chunk gets its own
