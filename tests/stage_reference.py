"""The definition of every stage's outputs in plain PyTorch, one function a stage, for small problems.

A stage is defined by its inputs alone, so each can be tested without the ones before it. The functions that compute
take an `Arithmetic` (reference.py): exact, what PyTorch does in the dtype, or magnitudes, for the tolerance rule.
Tensors over (slot, sub-block) pairs have the layout of the buffers; what is not `attended` in them means nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reference import EXACT, MAGNITUDES, Arithmetic, torch_arithmetic
from tolerances import Expected
from torch import Tensor

from fsa.problem import Chunk, Plan, Problem

LN_2 = math.log(2)
QUERY_TILE = 64  # of csrc/params.h


def expected(function: Callable[[Arithmetic], Tensor], dtype: torch.dtype) -> Expected:
    """The three answers that the tolerance rule compares with."""
    return Expected(*(function(arithmetic) for arithmetic in (EXACT, torch_arithmetic(dtype), MAGNITUDES)))


def masked(wanted: Expected, mask: Tensor) -> Expected:
    """Only where the mask (over the leading dimensions) is true."""
    return Expected(wanted.exact[mask], wanted.torch[mask], wanted.magnitude[mask])


def recentred(wanted: Expected, result: Tensor) -> Expected:
    """To compare one backend with the result of another instead of the exact one, with the same allowance."""
    result = result.to(torch.float64)
    return Expected(result, result + (wanted.torch - wanted.exact), wanted.magnitude)


# ---------------------------------------------------------------------------------------------------------------------
# Who attends to what
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Selection:
    """What the slots of a chunk select, in sub-blocks of tile_k keys. H, Q, T, U: heads, queries, slots, sub-blocks."""

    visible: Tensor  # bool [H, Q, T, U, tile_k]: whether the query sees this key of the sub-block
    key_row: Tensor  # int64 [H, Q, T, U, tile_k]: its row of k; 0 where it is not visible
    block: (
        Tensor  # int64 [H, Q, T]: number of the block among those of all sequences; -1 if the slot attends to nothing
    )
    sequence: Tensor  # int64 [Q]

    @property
    def attended(self) -> Tensor:
        """bool [H, Q, T, U]: whether the query sees any key of the sub-block."""
        return self.visible.any(-1)


def selection(problem: Problem, chunk: Chunk, tile_k: int) -> Selection:
    """Evaluates topk_idx and cu_seqlens (valid ones) for every slot of a chunk."""
    cu_seqlens_q, cu_seqlens_k = problem.cu_seqlens_q.tolist(), problem.cu_seqlens_k.tolist()
    last_key, key_begin, first_block, sequence = [], [], [], []
    for query in range(chunk.query_begin, chunk.query_end):
        b = max(b for b in range(problem.batch) if cu_seqlens_q[b] <= query)
        len_q, len_k = cu_seqlens_q[b + 1] - cu_seqlens_q[b], cu_seqlens_k[b + 1] - cu_seqlens_k[b]
        last_key.append(query - cu_seqlens_q[b] + len_k - len_q if problem.causal else len_k - 1)
        key_begin.append(cu_seqlens_k[b])
        first_block.append(cu_seqlens_k[b] // problem.block_size + b)
        sequence.append(b)

    def by_query(values: list[int]) -> Tensor:
        return torch.tensor(values, device=problem.q.device)[:, None]

    ids = problem.topk_idx[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end].long()
    key = ids[..., None] * problem.block_size + torch.arange(problem.block_size, device=ids.device)
    visible = (ids[..., None] >= 0) & (key <= by_query(last_key)[..., None])
    row = torch.where(visible, key + by_query(key_begin)[..., None], 0)
    return Selection(
        visible=visible.unflatten(-1, (-1, tile_k)),
        key_row=row.unflatten(-1, (-1, tile_k)),
        block=torch.where(visible.any(-1), ids + by_query(first_block), -1),
        sequence=torch.tensor(sequence, device=ids.device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------
def plan(problem: Problem, chunk: Chunk, edges_per_item: int, num_ranges: int = 1, min_rest: int = 1) -> Plan:
    """Sorts the edges; the tail of csr_edges, which no stage may read, is -1."""
    chosen = selection(problem, chunk, problem.block_size)
    range_queries = -(-chunk.num_queries // num_ranges)
    cells: list[list[int]] = [[] for _ in range(chunk.num_heads * num_ranges * problem.num_blocks)]
    for head, blocks in enumerate(chosen.block.flatten(1).tolist()):
        for edge, block in enumerate(blocks):
            if block >= 0:
                query_range = edge // problem.topk // range_queries
                cells[(head * num_ranges + query_range) * problem.num_blocks + block].append(edge)

    num_edges = chosen.block.numel()
    offsets = torch.tensor([0, *(len(edges) for edges in cells)]).cumsum(0).tolist()
    work_items = torch.full((num_edges // edges_per_item + len(cells), 4), -1, dtype=torch.int32)
    num_items = 0
    for cell, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        firsts = list(range(begin, end, edges_per_item))
        if len(firsts) > 1 and end - firsts[-1] < min_rest:
            firsts.pop()
        for first, item_end in itertools.pairwise([*firsts, end]):
            sequence = int(chosen.sequence[cells[cell][0] // problem.topk])
            head, block = cell // (num_ranges * problem.num_blocks), cell % problem.num_blocks
            row = [head * problem.num_blocks + block, first, item_end, sequence]
            work_items[num_items] = torch.tensor(row)
            num_items += 1
    edges = [edge for cell in cells for edge in cell]
    edges += [-1] * (num_edges - len(edges))
    csr_offsets, csr_edges = (torch.tensor(x, dtype=torch.int32).to(problem.q.device) for x in (offsets, edges))
    next_item = torch.zeros(1, dtype=torch.int32, device=problem.q.device)
    return Plan(csr_offsets, csr_edges, work_items.to(problem.q.device), next_item, edges_per_item)


@dataclass(frozen=True, eq=False)
class Split:
    """forward_split's results. H, Q, T: heads, queries, slots of the chunk."""

    scattered: Tensor  # int32 [H, Q, T]: scattered_idx; the blocks of a query may come in any order
    shared: Tensor  # bool [H, Q, T]: slots of topk_idx whose block is shared
    # By (head, query tile): (block, sequence, queries of the tile that share it, a bit each), in any order
    blocks: dict[tuple[int, int], set[tuple[int, int, int]]]


def split(problem: Problem, chunk: Chunk, run_queries: int, min_queries: int) -> Split:
    """Counts, run by run, the queries that select each block; a query's second listing of a block is not shared."""
    chosen = selection(problem, chunk, problem.block_size)
    ids = problem.topk_idx[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end]
    shared = torch.zeros_like(ids, dtype=torch.bool)
    blocks: dict[tuple[int, int], set[tuple[int, int, int]]] = {}
    for head, by_query in enumerate(chosen.block.tolist()):
        for begin in range(0, chunk.num_queries, QUERY_TILE):
            queries: dict[int, set[int]] = {}
            for query, row in enumerate(by_query[begin : begin + QUERY_TILE]):
                for block in {*row} - {-1}:
                    queries.setdefault(block, set()).add(query)
            sharing = {
                block: {
                    query for query in who if sum(query // run_queries == x // run_queries for x in who) >= min_queries
                }
                for block, who in queries.items()
            }
            blocks[head, begin // QUERY_TILE] = {
                (block, int(chosen.sequence[begin + min(who)]), sum(1 << query for query in who))
                for block, who in sharing.items()
                if who
            }
            for query, row in enumerate(by_query[begin : begin + QUERY_TILE]):
                for slot, block in enumerate(row):
                    if block >= 0 and query in sharing[block] and row.index(block) == slot:
                        shared[head, begin + query, slot] = True
    left = (chosen.block >= 0) & ~shared
    in_front = left.int().sort(dim=-1, descending=True, stable=True)
    scattered = torch.where(in_front.values.bool(), ids.gather(-1, in_front.indices), -1)
    return Split(scattered, shared, blocks)


@dataclass(frozen=True, eq=False)
class _Operands:
    """The rows that a chunk multiplies. G: group_size, K: tile_k, D: head_dim."""

    chosen: Selection
    q: Tensor  # [H, Q, G, D]
    k: Tensor  # [H, Q, T, U, K, D], zero where not visible
    v: Tensor  # [H, Q, T, U, K, D], zero where not visible
    scores: Tensor  # [H, Q, T, U, G, K], times softmax_scale
    score_error: Tensor  # [H, Q, T, U, G, K], 1 + the magnitude of a score where magnitudes are wanted, else 1


def _query_rows(x: Tensor, problem: Problem, chunk: Chunk, arithmetic: Arithmetic) -> Tensor:
    """[total_q, num_heads, head_dim] -> [H, Q, G, D]."""
    by_head = x.unflatten(1, (problem.num_kv_heads, problem.group_size)).transpose(0, 1)
    rows = by_head[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end]
    return arithmetic.rounded(rows)


def _query_numbers(x: Tensor, problem: Problem, chunk: Chunk, arithmetic: Arithmetic) -> Tensor:
    """[num_heads, total_q] -> [H, Q, 1, 1, G, 1]."""
    by_head = x.unflatten(0, (problem.num_kv_heads, problem.group_size)).transpose(1, 2)
    rows = by_head[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end]
    return rows.to(arithmetic.compute)[:, :, None, None, :, None]


def _operands(problem: Problem, chunk: Chunk, tile_k: int, arithmetic: Arithmetic) -> _Operands:
    chosen = selection(problem, chunk, tile_k)

    def gather(x: Tensor) -> Tensor:
        heads = x[:, chunk.head_begin : chunk.head_end].transpose(0, 1)
        rows = torch.stack([head[row] for head, row in zip(heads, chosen.key_row, strict=True)])
        return arithmetic.rounded(torch.where(chosen.visible[..., None], rows, 0))

    q, k, v = _query_rows(problem.q, problem, chunk, arithmetic), gather(problem.k), gather(problem.v)
    scores = torch.einsum("hqgd,hqtukd->hqtugk", q, k) * problem.softmax_scale
    scores = scores.masked_fill(~chosen.visible[..., None, :], -torch.inf)
    score_error = torch.ones_like(scores)
    if arithmetic.magnitudes:
        score_error += torch.einsum("hqgd,hqtukd->hqtugk", q.abs(), k.abs()) * problem.softmax_scale
    return _Operands(chosen, q, k, v, scores, score_error)


def partial_output(problem: Problem, chunk: Chunk, tile_k: int, arithmetic: Arithmetic) -> Tensor:
    """forward_main's o_partial [H, Q, T, U, G, D], before it is scaled by 2^-value_exponent."""
    o = _operands(problem, chunk, tile_k, arithmetic)
    probs = arithmetic.rounded(o.scores.softmax(-1)).masked_fill(~o.chosen.visible[..., None, :], 0) * o.score_error
    return torch.einsum("hqtugk,hqtukd->hqtugd", probs, arithmetic.term(o.v))


def partial_lse(problem: Problem, chunk: Chunk, tile_k: int, arithmetic: Arithmetic) -> Tensor:
    """forward_main's lse_partial [H, Q, T, U, G], in base 2."""
    o = _operands(problem, chunk, tile_k, arithmetic)
    lse = o.scores.logsumexp(-1)
    if arithmetic.magnitudes:
        lse = lse.abs() + (o.scores.softmax(-1) * o.score_error).sum(-1)
    return lse / LN_2


def _shared_partial(
    problem: Problem, chunk: Chunk, tile_k: int, shared: Tensor, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the slots that `shared` [H, Q, T] names: its output [H, Q, G, D] and log-sum-exp [H, Q, G].

    The third result is the magnitude of what the log-sum-exp adds up, where magnitudes are wanted.
    """
    o = _operands(problem, chunk, tile_k, arithmetic)
    keys = (o.chosen.visible & shared[..., None, None])[:, :, :, :, None]  # [H, Q, T, U, 1, K]
    scores = o.scores.masked_fill(~keys, -torch.inf).movedim(4, 2).flatten(3)  # [H, Q, G, T * U * K]
    errors = o.score_error.movedim(4, 2).flatten(3)
    lse = scores.logsumexp(-1)
    probs = (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp() * errors
    values = torch.where(keys.movedim(4, -1), o.v, 0)
    return arithmetic.rounded(probs) @ arithmetic.term(values).flatten(2, 4), lse, probs.sum(-1)


def value_exponent(problem: Problem, chunk: Chunk, tile_k: int) -> tuple[Tensor, Tensor]:
    """forward_main's value_exponent [H, num_blocks, U], and where it is defined: sub-blocks that someone attends to."""
    chosen = selection(problem, chunk, tile_k)
    lowest, highest = {torch.float16: (0, 120), torch.bfloat16: (-100, 120), torch.float32: (0, 0)}[problem.v.dtype]
    exponents = torch.zeros(chunk.num_heads, problem.num_blocks, problem.block_size // tile_k, dtype=torch.int32)
    defined = torch.zeros(exponents.shape, dtype=torch.bool)
    cu_seqlens_k = problem.cu_seqlens_k.tolist()
    for head, query, slot, sub in chosen.attended.nonzero().tolist():
        sequence, block = int(chosen.sequence[query]), int(chosen.block[head, query, slot])
        first_block = cu_seqlens_k[sequence] // problem.block_size + sequence
        begin = cu_seqlens_k[sequence] + (block - first_block) * problem.block_size + sub * tile_k
        values = problem.v[begin : min(begin + tile_k, cu_seqlens_k[sequence + 1]), chunk.head_begin + head]
        largest = float(values[values.isfinite()].abs().max()) if values.isfinite().any() else 0.0
        exponent = math.frexp(largest)[1] - 1 - 14 if largest > 0 else 0
        exponents[head, block, sub] = min(max(exponent, lowest), highest) if largest > 0 else 0
        defined[head, block, sub] = True
    return exponents.to(problem.v.device), defined.to(problem.v.device)


def exponent_of_partials(problem: Problem, chunk: Chunk, exponents: Tensor) -> Tensor:
    """value_exponent [H, num_blocks, U] for each entry [H, Q, T, U] of o_partial; 0 where nothing is attended."""
    chosen = selection(problem, chunk, problem.block_size // exponents.shape[2])
    by_slot = torch.stack([x[block] for x, block in zip(exponents, chosen.block, strict=True)])
    return torch.where(chosen.attended, by_slot, 0)


def merged(
    problem: Problem, chunk: Chunk, output: Tensor, lse: Tensor, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """forward_reduce: out [Q, heads of the chunk, D] and lse [heads of the chunk, Q] from unscaled partials."""
    return _merge(*_attended_partials(problem, chunk, output, lse, arithmetic), arithmetic)


def merged_with_shared(
    scattered: Problem,
    problem: Problem,
    chunk: Chunk,
    shared: Tensor,
    output: Tensor,
    lse: Tensor,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor]:
    """forward_shared, the results as of `merged`.

    From unscaled partials of the blocks in `scattered` and the slots of `problem` that `shared` [H, Q, T] names.
    """
    outputs, log_sums = _attended_partials(scattered, chunk, output, lse, arithmetic)
    tile_k = problem.block_size // output.shape[3]
    shared_output, shared_lse, magnitude = _shared_partial(problem, chunk, tile_k, shared, arithmetic)
    outputs = torch.cat([outputs, shared_output[:, :, None]], 2)
    log_sums = torch.cat([log_sums, shared_lse[:, :, None]], 2)
    out, total = _merge(outputs, log_sums, arithmetic)
    if arithmetic.magnitudes:
        total += torch.where(shared_lse == -torch.inf, 0, magnitude).transpose(1, 2).flatten(0, 1)
    return out, total


def _attended_partials(
    problem: Problem, chunk: Chunk, output: Tensor, lse: Tensor, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """Outputs [H, Q, T * U, G, D] and log-sum-exps [H, Q, T * U, G] of partials, zero and -inf where there is none."""
    attended = selection(problem, chunk, problem.block_size // output.shape[3]).attended
    outputs = torch.where(attended[..., None, None], output.to(arithmetic.compute), 0)
    log_sums = torch.where(attended[..., None], lse.to(arithmetic.compute) * LN_2, -torch.inf)
    return outputs.flatten(2, 3), log_sums.flatten(2, 3)


def _merge(outputs: Tensor, log_sums: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """out [Q, heads of the chunk, D] and lse [heads of the chunk, Q] from [H, Q, n, G, D] and [H, Q, n, G]."""
    total = log_sums.logsumexp(2)  # [H, Q, G]
    weights = (log_sums - torch.where(total == -torch.inf, 0, total)[:, :, None]).exp()
    out = (weights[..., None] * arithmetic.term(outputs)).sum(2)
    if arithmetic.magnitudes:
        total = torch.where(total == -torch.inf, total, total.abs() + 1)
    return arithmetic.rounded(out).transpose(0, 1).flatten(1, 2), total.transpose(1, 2).flatten(0, 1)


def delta(out: Tensor, dout: Tensor | None, dlse: Tensor | None, arithmetic: Arithmetic) -> Tensor:
    """backward_preprocess: [num_heads, total_q]."""
    total_q, num_heads, _ = out.shape
    result = torch.zeros(num_heads, total_q, dtype=arithmetic.compute, device=out.device)
    if dout is not None:
        result += arithmetic.term(arithmetic.rounded(out) * arithmetic.rounded(dout)).sum(-1).T
    if dlse is not None:
        result -= arithmetic.term(dlse.to(arithmetic.compute)) * (-1 if arithmetic.magnitudes else 1)
    return result


@dataclass(frozen=True, eq=False)
class EdgeGradients:
    """What each edge of a chunk gives to its query and to its block."""

    dq: Tensor  # [H, Q, T, U, G, D], backward_main's dq_partial
    dk: Tensor  # [H, Q, T, U, K, D]
    dv: Tensor  # [H, Q, T, U, K, D]


def edge_gradients(
    problem: Problem, chunk: Chunk, tile_k: int, dout: Tensor, lse: Tensor, delta: Tensor, arithmetic: Arithmetic
) -> EdgeGradients:
    """The products of backward_main, before they are summed."""
    o = _operands(problem, chunk, tile_k, arithmetic)
    dout = arithmetic.term(_query_rows(dout, problem, chunk, arithmetic))
    lse, delta = (_query_numbers(x, problem, chunk, arithmetic) for x in (lse, delta))
    probs = (o.scores - lse).exp().masked_fill(~o.chosen.visible[..., None, :], 0) * o.score_error
    dprobs = torch.einsum("hqgd,hqtukd->hqtugk", dout, arithmetic.term(o.v))
    dscores = probs * (dprobs + delta.abs() if arithmetic.magnitudes else dprobs - delta)
    dscores = arithmetic.rounded(dscores.masked_fill(~o.chosen.visible[..., None, :], 0))
    scale = problem.softmax_scale
    return EdgeGradients(
        dq=torch.einsum("hqtugk,hqtukd->hqtugd", dscores, arithmetic.term(o.k)) * scale,
        dk=torch.einsum("hqtugk,hqgd->hqtukd", dscores, arithmetic.term(o.q)) * scale,
        dv=torch.einsum("hqtugk,hqgd->hqtukd", arithmetic.rounded(probs), dout),
    )


@dataclass(frozen=True)
class Piece:
    """A work item of a cut cell."""

    row: int  # of dkv_pieces
    cell: int
    edge_begin: int
    edge_end: int
    sequence: int


def pieces_of(plan: Plan) -> list[Piece]:
    """The work items of cut cells, those of a cell in order."""
    offsets = plan.csr_offsets.tolist()
    return [
        Piece(
            2 * offsets[cell] // plan.edges_per_item + (begin - offsets[cell]) // plan.edges_per_item,
            cell,
            begin,
            end,
            b,
        )
        for cell, begin, end, b in plan.work_items.tolist()
        if cell >= 0 and offsets[cell + 1] - offsets[cell] > plan.edges_per_item
    ]


def written_pieces(plan: Plan, dkv_pieces: Tensor) -> Tensor:
    """bool [max_pieces]: rows of dkv_pieces that backward_main writes."""
    written = torch.zeros(len(dkv_pieces), dtype=torch.bool, device=dkv_pieces.device)
    written[[piece.row for piece in pieces_of(plan)]] = True
    return written


def summed_by_piece(problem: Problem, chunk: Chunk, plan: Plan, gradients: EdgeGradients) -> Tensor:
    """backward_main's dkv_pieces [max_pieces, U, 2, tile_k, D]."""
    contributions = torch.stack([gradients.dk, gradients.dv], 4).flatten(1, 2)  # [H, Q * T, U, 2, K, D]
    num_edges = chunk.num_heads * contributions.shape[1]
    sums = contributions.new_zeros(2 * num_edges // plan.edges_per_item + 1, *contributions.shape[2:])
    for piece in pieces_of(plan):
        edges = plan.csr_edges[piece.edge_begin : piece.edge_end].long()
        sums[piece.row] = contributions[piece.cell // problem.num_blocks, edges].sum(0)
    return sums


def uncut_edges(problem: Problem, chunk: Chunk, plan: Plan) -> Tensor:
    """bool [H, Q, T]: edges of cells that are one work item, whose dK and dV backward_main writes itself."""
    uncut = torch.zeros(chunk.num_heads, chunk.num_queries * problem.topk, dtype=torch.bool)
    offsets, edges = plan.csr_offsets.tolist(), plan.csr_edges.tolist()
    for cell, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if end - begin <= plan.edges_per_item:
            uncut[cell // problem.num_blocks, edges[begin:end]] = True
    return uncut.unflatten(1, (chunk.num_queries, problem.topk)).to(problem.q.device)


def summed_by_key(problem: Problem, chosen: Selection, gradient: Tensor, edges: Tensor) -> Tensor:
    """Sum of dk or dv [H, Q, T, U, K, D] over some edges [H, Q, T], by key: [total_k, H, D]."""
    kept = torch.where((chosen.visible & edges[..., None, None])[..., None], gradient, 0)
    rows = [
        kept.new_zeros(problem.total_k, kept.shape[-1]).index_add(0, row.flatten(), x.flatten(0, -2))
        for row, x in zip(chosen.key_row, kept, strict=True)
    ]
    return torch.stack(rows, 1)


def dq_of_partials(problem: Problem, chunk: Chunk, dq_partial: Tensor, arithmetic: Arithmetic) -> Tensor:
    """backward_reduce's dq [Q, heads of the chunk, D]."""
    attended = selection(problem, chunk, problem.block_size // dq_partial.shape[3]).attended
    kept = torch.where(attended[..., None, None], dq_partial.to(arithmetic.compute), 0)
    return arithmetic.rounded(arithmetic.term(kept).sum((2, 3))).transpose(0, 1).flatten(1, 2)


def dkv_of_pieces(
    problem: Problem, chunk: Chunk, plan: Plan, dkv_pieces: Tensor, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """backward_reduce's sums for cut cells, dk and dv stacked [2, total_k, H, D], and their keys, bool [total_k, H]."""
    shape = (2, problem.total_k, chunk.num_heads, problem.head_dim)
    sums = torch.zeros(shape, dtype=arithmetic.compute, device=dkv_pieces.device)
    keys_of_cut_cells = torch.zeros(shape[1:3], dtype=torch.bool, device=dkv_pieces.device)
    cu_seqlens_k = problem.cu_seqlens_k.tolist()
    for piece in pieces_of(plan):
        head, block = divmod(piece.cell, problem.num_blocks)
        begin, end = cu_seqlens_k[piece.sequence : piece.sequence + 2]
        begin += (block - begin // problem.block_size - piece.sequence) * problem.block_size
        end = min(end, begin + problem.block_size)
        rows = dkv_pieces[piece.row].transpose(0, 1).flatten(1, 2).to(arithmetic.compute)  # [2, block_size, D]
        sums[:, begin:end, head] += arithmetic.term(rows[:, : end - begin])
        keys_of_cut_cells[begin:end, head] = True
    return sums, keys_of_cut_cells
