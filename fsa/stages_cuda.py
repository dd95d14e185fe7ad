"""The stages bound to the compiled extension: same names and signatures as in `triton_ref.stages`.

The extension implements the private ops whose schemas stand here; `fsa.backends` loads it first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import kernel_arch
from .buffers import allocate_together, plan_buffers
from .problem import Chunk, ChunkGrid, Plan, Problem
from .tiling import plan_parts, plan_scratch

_SELECTION = "Tensor topk_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_CHUNK = "int head_begin, int head_end, int query_begin, int query_end, int block_size, bool causal"
_CHUNKS = (
    "int head_begin, int head_end, int query_begin, int query_end, int chunk_heads, int chunk_queries, int block_size, "
    "bool causal"
)
_PLAN = "Tensor csr_offsets, Tensor csr_edges, Tensor work_items, Tensor(n!) next_item, int edges_per_item"
_SHARED = "Tensor shared_blocks, Tensor shared_counts, Tensor scattered_counts, Tensor(n!) shared_next"

_library = torch.library.Library("fsa", "FRAGMENT")
_library.define(
    f"_forward_split({_SELECTION}, {_CHUNKS}, int total_k, int run_queries, int min_queries, "
    "Tensor(a!) scattered_idx, Tensor(b!) shared_blocks, Tensor(c!) shared_counts, Tensor(d!) scattered_counts, "
    "Tensor(e!) shared_next) -> ()"
)
_library.define(
    f"_plan({_SELECTION}, {_CHUNKS}, int total_k, int edges_per_item, int min_rest, int num_ranges, int parts, "
    "Tensor(a!) csr_offsets, Tensor(b!) csr_edges, Tensor(c!) work_items, Tensor(d!) next_item, Tensor(e!) scratch) "
    "-> ()"
)
_library.define(
    f"_forward_main(Tensor q, Tensor k, Tensor v, {_SELECTION}, {_CHUNK}, float softmax_scale, {_PLAN}, "
    "Tensor(a!) o_partial, Tensor(b!) lse_partial, Tensor(c!) value_exponent, int arch) -> ()"
)
_library.define(
    f"_forward_shared(Tensor q, Tensor k, Tensor v, {_SELECTION}, {_CHUNK}, float softmax_scale, {_SHARED}, "
    "Tensor o_partial, Tensor lse_partial, Tensor value_exponent, Tensor(a!) out, Tensor(b!) lse) -> ()"
)
_library.define(
    f"_forward_reduce({_SELECTION}, {_CHUNK}, int total_k, Tensor o_partial, Tensor lse_partial, "
    "Tensor value_exponent, Tensor(a!) out, Tensor(b!) lse) -> ()"
)
_library.define("_backward_preprocess(Tensor out, Tensor dout, Tensor? dlse, Tensor(a!) delta) -> ()")
_library.define(
    f"_backward_main(Tensor q, Tensor k, Tensor v, {_SELECTION}, {_CHUNK}, float softmax_scale, {_PLAN}, Tensor dout, "
    "Tensor lse, Tensor delta, Tensor(a!) dq_partial, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dkv_pieces, "
    "bool accumulate, int arch) -> ()"
)
_library.define(
    f"_backward_reduce({_SELECTION}, {_CHUNK}, int total_k, Tensor csr_offsets, int edges_per_item, "
    "Tensor dq_partial, Tensor dkv_pieces, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, bool accumulate) -> ()"
)
_ops = torch.ops.fsa

_Selection = tuple[Tensor, Tensor, Tensor]
_ChunkArguments = tuple[int, int, int, int, int, bool]


def _selection(problem: Problem) -> _Selection:
    return problem.topk_idx, problem.cu_seqlens_q, problem.cu_seqlens_k


def _chunk(problem: Problem, chunk: Chunk) -> _ChunkArguments:
    return (
        chunk.head_begin,
        chunk.head_end,
        chunk.query_begin,
        chunk.query_end,
        problem.block_size,
        problem.causal,
    )


def _chunks(problem: Problem, grid: ChunkGrid) -> tuple[int, int, int, int, int, int, int, bool]:
    return (
        grid.head_begin,
        grid.head_end,
        grid.query_begin,
        grid.query_end,
        grid.chunk_heads,
        grid.chunk_queries,
        problem.block_size,
        problem.causal,
    )


def _plan(plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return plan.csr_offsets, plan.csr_edges, plan.work_items, plan.next_item, plan.edges_per_item


def shares_blocks(problem: Problem) -> bool:
    """Whether the forward has the stages split and shared.

    They are there on sm_90a, for blocks of 64 keys and more and groups of an even number of heads. On an H200 at 65,536
    tokens they take 8 % off the forward of a random selection at group 2, 12 % at group 4, and 31 % of a coherent
    one at group 16. A group of one head would need query tiles twice as long, which gained 1 % with a random selection
    and lost 2 % with a trained one.
    """
    supported = problem.block_size % 64 == 0 and problem.group_size % 2 == 0
    return supported and kernel_arch(problem.q.device) >= 90


def forward_split(
    problem: Problem,
    grid: ChunkGrid,
    run_queries: int,
    min_queries: int,
    scattered_idx: Tensor,
    shared_blocks: Tensor,
    shared_counts: Tensor,
    scattered_counts: Tensor,
    shared_next: Tensor,
) -> None:
    """Find the blocks that at least `min_queries` of a run select; leave the others in `scattered_idx`.

    A run is `run_queries` neighbouring queries, a part of a query tile. The heads of all chunks of the grid stand one
    after the other in the buffers, which have room for as many chunks as large as the first.
    """
    _ops._forward_split(
        *_selection(problem),
        *_chunks(problem, grid),
        problem.total_k,
        run_queries,
        min_queries,
        scattered_idx,
        shared_blocks,
        shared_counts,
        scattered_counts,
        shared_next,
    )


def plan(problem: Problem, grid: ChunkGrid, edges_per_item: int, num_ranges: int = 1, min_rest: int = 1) -> list[Plan]:
    """Invert each chunk's selection into CSR by (KV head, query range, KV block) and cut it into work items.

    A cell's rest of fewer than `min_rest` edges is part of the item before; the backward, whose pieces are
    ceil(edges / edges_per_item), takes 1.
    """
    chunks = grid.chunks
    largest, num_chunks = chunks[0], len(chunks)
    parts = plan_parts(num_chunks * largest.num_heads, largest.num_queries, num_ranges)
    specs = [
        plan_buffers(chunk.num_heads, chunk.num_queries, problem.topk, problem.num_blocks, edges_per_item, num_ranges)
        for chunk in chunks
    ]
    together, of_chunks = allocate_together(specs, problem.topk_idx.device)
    scratch = problem.topk_idx.new_empty(
        (num_chunks, plan_scratch(largest.num_heads, num_ranges, parts, problem.num_blocks))
    )
    _ops._plan(
        *_selection(problem),
        *_chunks(problem, grid),
        problem.total_k,
        edges_per_item,
        min_rest,
        num_ranges,
        parts,
        *together.values(),
        scratch,
    )
    return [Plan(edges_per_item=edges_per_item, **buffers) for buffers in of_chunks]


def forward_main(
    problem: Problem, chunk: Chunk, plan: Plan, o_partial: Tensor, lse_partial: Tensor, value_exponent: Tensor
) -> None:
    """Attend to every planned (query, slot) on its own; write its normalised output and log-sum-exp."""
    _ops._forward_main(
        problem.q,
        problem.k,
        problem.v,
        *_selection(problem),
        *_chunk(problem, chunk),
        problem.softmax_scale,
        *_plan(plan),
        o_partial,
        lse_partial,
        value_exponent,
        kernel_arch(problem.q.device),
    )


def forward_shared(
    problem: Problem,
    chunk: Chunk,
    shared_blocks: Tensor,
    shared_counts: Tensor,
    scattered_counts: Tensor,
    shared_next: Tensor,
    o_partial: Tensor,
    lse_partial: Tensor,
    value_exponent: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attend to the blocks that a query tile shares, and merge that with partials of the others, into `out` and `lse`.

    `problem` has `scattered_idx` for its topk_idx.
    """
    _ops._forward_shared(
        problem.q,
        problem.k,
        problem.v,
        *_selection(problem),
        *_chunk(problem, chunk),
        problem.softmax_scale,
        shared_blocks,
        shared_counts,
        scattered_counts,
        shared_next,
        o_partial,
        lse_partial,
        value_exponent,
        out,
        lse,
    )


def forward_reduce(
    problem: Problem,
    chunk: Chunk,
    o_partial: Tensor,
    lse_partial: Tensor,
    value_exponent: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge the partials of every query's slots into `out` and `lse`."""
    _ops._forward_reduce(
        *_selection(problem),
        *_chunk(problem, chunk),
        problem.total_k,
        o_partial,
        lse_partial,
        value_exponent,
        out,
        lse,
    )


def backward_preprocess(out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    """delta = rowsum(dout * out) - dlse."""
    _ops._backward_preprocess(out, dout, dlse, delta)


def backward_main(
    problem: Problem,
    chunk: Chunk,
    plan: Plan,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq_partial: Tensor,
    dk: Tensor,
    dv: Tensor,
    dkv_pieces: Tensor,
    accumulate: bool,
) -> None:
    """dK and dV of every block, or of its pieces where it is cut, and the partial dQ of every (query, slot)."""
    _ops._backward_main(
        problem.q,
        problem.k,
        problem.v,
        *_selection(problem),
        *_chunk(problem, chunk),
        problem.softmax_scale,
        *_plan(plan),
        dout,
        lse,
        delta,
        dq_partial,
        dk,
        dv,
        dkv_pieces,
        accumulate,
        kernel_arch(problem.q.device),
    )


def backward_reduce(
    problem: Problem,
    chunk: Chunk,
    plan: Plan,
    dq_partial: Tensor,
    dkv_pieces: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
) -> None:
    """dQ from its partials; dK and dV of the cut blocks from their pieces."""
    _ops._backward_reduce(
        *_selection(problem),
        *_chunk(problem, chunk),
        problem.total_k,
        plan.csr_offsets,
        plan.edges_per_item,
        dq_partial,
        dkv_pieces,
        dq,
        dk,
        dv,
        accumulate,
    )
