"""forward_split and forward_shared: blocks that neighbours share are attended to query-outer, the rest is merged."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import cases
import pytest
import stage_reference
import torch
from harness import DEVICE, Target, forward
from partials import assert_results, empty_results, make_partials, unscaled
from stage_reference import QUERY_TILE, Split
from stages import (
    POISON,
    Case,
    alone,
    assert_margins,
    carved,
    forward_buffers,
    load_stages,
    make_chunk,
    make_problem,
    poisoned,
    record_shared_blocks,
)
from tolerances import Expected, assert_close, expected_results
from torch import Tensor

import fsa
from fsa import backends
from fsa.buffers import Sizes, by_chunk, shared_buffers
from fsa.problem import Chunk, ChunkGrid, Problem

# Queries of a run, and how many of them must select a block. A quarter of a tile leaves some slots of CASES scattered.
RUNS = ((64, 1), (64, 8), (64, 64), (32, 5), (16, 4), (8, 1), (8, 3))
ALL, QUARTER_OF_A_TILE = (64, 1), (64, 16)
DTYPES = (torch.float16, torch.bfloat16)
SUB_BLOCK = 64  # keys of a sub-block in forward_shared
# Tiles that share more sub-blocks than a loader's warp has lanes.
LONG_LISTS = (
    Case("many_blocks", (70,), (2500,), 1, 2, 16, 40, 64, causal=False),
    Case("many_sub_blocks", (70,), (2500,), 1, 6, 16, 14, 256, causal=False),
)
CASES = (
    Case("two_heads", (150,), (150,), 2, 2, 64, 3, 64),
    Case("ragged", (37, 0, 1, 3, 90), (37, 0, 5, 3, 170), 2, 6, 24, 5, 64),
    Case("full", (1, 70), (70, 133), 1, 2, 128, 7, 64, causal=False),
    Case("sub_blocks", (70,), (300,), 1, 10, 80, 2, 256),
    Case("wide_head", (40,), (140,), 1, 16, 256, 2, 128),
    Case("twelve_heads", (70,), (100,), 1, 12, 48, 3, 64),
    Case("many_heads", (12,), (100,), 1, 128, 72, 2, 64),
    Case("many_wide_heads", (10,), (90,), 1, 128, 200, 2, 64),
    Case("many_slots", (80,), (200,), 1, 4, 136, 21, 64),
    Case("chunk", (90, 160), (90, 175), 3, 2, 16, 4, 128, heads=(1, 3), queries=(37, 190)),
    Case("four_heads", (100, 64), (400, 200), 2, 4, 128, 8, 64, causal=False),
    Case("sixteen_heads", (130,), (300,), 1, 16, 128, 8, 64, causal=False),
    *LONG_LISTS,
)


@pytest.fixture
def stages() -> ModuleType:
    """The CUDA stages, where they have the query-outer ones."""
    result = load_stages("cuda")
    if backends.kernel_arch(DEVICE) < 90:
        pytest.skip("kernels of sm_90")
    return result


def run_split(
    stages: ModuleType, problem: Problem, chunk: Chunk, run: tuple[int, int] = QUARTER_OF_A_TILE
) -> tuple[Tensor, dict[str, Tensor]]:
    """scattered_idx of the chunk, and the other results; nothing is written outside the chunk."""
    sizes = Sizes.of(problem, shares_blocks=True)
    buffers = poisoned(shared_buffers(sizes, chunk.num_heads, chunk.num_queries))
    most = QUERY_TILE * problem.topk // run[1]
    buffers["shared_blocks"] = buffers["shared_blocks"].new_full((*buffers["shared_counts"].shape, most, 4), POISON)
    buffers, wholes = carved({**buffers, "scattered": torch.full_like(problem.topk_idx, POISON)})
    scattered = buffers.pop("scattered")
    stages.forward_split(problem, alone(chunk), *run, scattered, **buffers)
    assert_margins(wholes)
    assert ((buffers["shared_counts"] >= 0) & (buffers["shared_counts"] <= most)).all()
    mine = scattered[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end]
    result = mine.clone()
    mine[:] = POISON
    assert (scattered == POISON).all(), "written outside the chunk"
    return result, buffers


def assert_split(actual: tuple[Tensor, dict[str, Tensor]], wanted: Split) -> None:
    scattered, buffers = actual
    assert torch.equal(scattered.sort(-1).values, wanted.scattered.sort(-1).values)
    counts = (wanted.scattered >= 0).sum(-1, dtype=torch.int32)
    assert torch.equal(buffers["scattered_counts"], counts)
    assert torch.equal(scattered >= 0, torch.arange(scattered.shape[-1], device=counts.device) < counts[..., None])
    for (head, tile), blocks in wanted.blocks.items():
        count = int(buffers["shared_counts"][head, tile])
        rows = buffers["shared_blocks"][head, tile].tolist()
        assert count == len(blocks)
        assert {(block, b, low % 2**32 + high % 2**32 * 2**32) for block, b, low, high in rows[:count]} == blocks
        assert all(row == [0] * 4 for row in rows[count:32])
        assert all(row == [POISON] * 4 for row in rows[max(count, 32) :])


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_split(stages: ModuleType, case: Case, run: tuple[int, int]) -> None:
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    assert_split(run_split(stages, problem, chunk, run), stage_reference.split(problem, chunk, *run))


def test_split_of_several_chunks(stages: ModuleType) -> None:
    """The last heads and the last queries are fewer; every chunk begins a query tile."""
    case = Case("together", (130, 100), (130, 120), 5, 2, 8, 4, 64)
    problem, grid = make_problem(case, torch.float16), ChunkGrid(0, 5, 0, 230, chunk_heads=2, chunk_queries=90)
    chunks, sizes = grid.chunks, Sizes.of(problem, shares_blocks=True)
    scattered = torch.full_like(problem.topk_idx, POISON)
    largest = poisoned(shared_buffers(sizes, 2, 90))
    most = QUERY_TILE * problem.topk // QUARTER_OF_A_TILE[1]
    largest["shared_blocks"] = largest["shared_blocks"].new_full((2, 2, most, 4), POISON)
    together = {name: torch.stack([buffer] * len(chunks)) for name, buffer in largest.items()}
    heads_of_all = {name: tensor.flatten(0, 1) for name, tensor in together.items()}
    stages.forward_split(problem, grid, *QUARTER_OF_A_TILE, scattered, **heads_of_all)
    specs = [shared_buffers(sizes, chunk.num_heads, chunk.num_queries) for chunk in chunks]
    shapes = {name: [spec[name].shape for spec in specs] for name in together}
    shapes["shared_blocks"] = [(*shape, most, 4) for shape in shapes["shared_counts"]]
    buffers = {name: by_chunk(tensor, shapes[name]) for name, tensor in together.items()}
    for i, chunk in enumerate(chunks):
        mine = scattered[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end]
        of_chunk = {name: parts[i] for name, parts in buffers.items()}
        assert_split((mine, of_chunk), stage_reference.split(problem, chunk, *QUARTER_OF_A_TILE))


def test_split_of_more_blocks_than_its_tables_hold(stages: ModuleType) -> None:
    """Blocks are taken in windows of 2048."""
    case = Case("windows", (100, 200), (140000, 160000), 2, 1, 8, 7, 64, popular=True)
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    assert problem.num_blocks > 4096
    problem.topk_idx[:, 150:200, 2:4] = torch.tensor([2400, 2047], dtype=torch.int32)
    for run in RUNS:
        assert_split(run_split(stages, problem, chunk, run), stage_reference.split(problem, chunk, *run))


@pytest.mark.parametrize("run", [ALL, (8, 2)], ids=str)
@pytest.mark.parametrize("cu_seqlens", [[0, 200, 100, 127], [5, 40, 40, 90], [-50, 2**31 - 1, 300, -(2**31)]], ids=str)
def test_hostile_cu_seqlens_stay_in_bounds(stages: ModuleType, cu_seqlens: list[int], run: tuple[int, int]) -> None:
    """run_split and run_shared look at what lies beside what they write, and at the counts."""
    case = Case("hostile", (50, 0, 77), (50, 0, 77), 2, 2, 8, 5, 64)
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    hostile = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    problem = dataclasses.replace(problem, cu_seqlens_q=hostile, cu_seqlens_k=hostile)
    scattered_idx, split = run_split(stages, problem, chunk, run)
    problem = dataclasses.replace(problem, topk_idx=scattered_idx)  # the chunk is all there is
    run_shared(stages, problem, chunk, split, forward_buffers(problem, chunk))


def run_shared(
    stages: ModuleType, problem: Problem, chunk: Chunk, split: dict[str, Tensor], partials: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """out and lse of the whole problem; what the chunk does not have is NaN. Nothing is written beside them."""
    out, lse = empty_results(problem)
    results, wholes = carved({"out": out, "lse": lse})
    stages.forward_shared(problem, chunk, **split, **partials, **results)
    assert_margins(wholes)
    return results["out"], results["lse"]


def assert_shared(stages: ModuleType, problem: Problem, chunk: Chunk, run: tuple[int, int]) -> None:
    scattered_idx, split = run_split(stages, problem, chunk, run)
    whole = torch.full_like(problem.topk_idx, POISON)
    whole[chunk.head_begin : chunk.head_end, chunk.query_begin : chunk.query_end] = scattered_idx
    scattered = dataclasses.replace(problem, topk_idx=whole)
    partials = make_partials(scattered, chunk)
    results = run_shared(stages, scattered, chunk, split, partials)
    shared = stage_reference.split(problem, chunk, *run).shared
    output, lse = unscaled(scattered, chunk, partials), partials["lse_partial"]

    def expected(index: int) -> Expected:
        return stage_reference.expected(
            lambda a: stage_reference.merged_with_shared(scattered, problem, chunk, shared, output, lse, a)[index],
            problem.q.dtype,
        )

    assert_results(problem, chunk, results, (expected(0), expected(1)))


@pytest.mark.parametrize("run", [ALL, QUARTER_OF_A_TILE, (64, 64), (8, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared(stages: ModuleType, case: Case, dtype: torch.dtype, run: tuple[int, int]) -> None:
    assert_shared(stages, make_problem(case, dtype), make_chunk(case), run)


def test_nothing_attended(stages: ModuleType) -> None:
    case = CASES[0]
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    problem = dataclasses.replace(problem, topk_idx=torch.full_like(problem.topk_idx, -2))
    scattered, split = run_split(stages, problem, chunk)
    assert (scattered == -1).all() and not split["scattered_counts"].any() and not split["shared_counts"].any()
    problem = dataclasses.replace(problem, topk_idx=scattered)
    out, lse = run_shared(stages, problem, chunk, split, forward_buffers(problem, chunk))
    assert not out.any() and lse.isneginf().all()


@pytest.mark.parametrize(
    ("dtype", "log2_size"), [(torch.float16, 13), (torch.bfloat16, -110), (torch.bfloat16, 125)], ids=str
)
def test_values_of_any_size(stages: ModuleType, dtype: torch.dtype, log2_size: int) -> None:
    case = CASES[1]
    problem = make_problem(case, dtype)
    problem = dataclasses.replace(problem, v=(problem.v.double().clamp(-3.9, 3.9) * 2.0**log2_size).to(dtype))
    assert_shared(stages, problem, make_chunk(case), ALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_keys_and_values_reach_only_who_sees_them(stages: ModuleType, dtype: torch.dtype) -> None:
    case = Case("nonfinite", (70,), (70,), 1, 6, 24, 2, 64)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    k, v = problem.k.clone(), problem.v.clone()
    v[5, 0, 3], v[9, 0, 3], v[12, 0, 4], v[40, 0], v[66, 0, 0] = torch.inf, -torch.inf, torch.inf, torch.nan, -torch.inf
    k[50, 0, 3] = torch.nan
    assert_shared(stages, dataclasses.replace(problem, k=k, v=v), chunk, ALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_keys_and_values_of_the_next_sequence(stages: ModuleType, dtype: torch.dtype) -> None:
    """Which share a sub-block's rows in memory with the keys of the one before it, whose last block is not full."""
    case = Case("next_sequence", (70, 70), (70, 70), 1, 6, 24, 2, 64)
    problem, chunk = make_problem(case, dtype), make_chunk(case)
    k, v = problem.k.clone(), problem.v.clone()
    v[70, 0, 3], v[71, 0], v[120, 0, 5], k[72, 0, 3], k[101, 0] = torch.inf, torch.nan, -torch.inf, torch.nan, torch.inf
    assert_shared(stages, dataclasses.replace(problem, k=k, v=v), chunk, ALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(stages: ModuleType, dtype: torch.dtype) -> None:
    problem = make_problem(CASES[0], dtype)
    problem = dataclasses.replace(problem, q=problem.q * 100, k=problem.k * 100)
    assert_shared(stages, problem, make_chunk(CASES[0]), ALL)


@pytest.mark.parametrize("case", LONG_LISTS, ids=str)
def test_lists_are_long(case: Case) -> None:
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    blocks = stage_reference.split(problem, chunk, *QUARTER_OF_A_TILE).blocks[0, 0]
    assert len(blocks) * problem.block_size // SUB_BLOCK > 32


def test_some_boxes_of_partials_have_gaps() -> None:
    """test_shared then has partials of eight neighbouring queries come at once, of which main did not write all."""
    case, box = CASES[0], 8
    problem, chunk = make_problem(case, torch.float16), make_chunk(case)
    exists = stage_reference.split(problem, chunk, 64, 64).scattered >= 0
    assert ((64, 64) in RUNS) and exists.shape[:2] == (2, 150)
    padded = torch.nn.functional.pad(exists.int(), (0, 0, 0, -exists.shape[1] % box))
    partials = padded.unflatten(1, (-1, box)).sum(2)  # [heads, boxes, slots]
    has_gaps = (partials > box // 2) & (partials < box)
    assert has_gaps[:, :-1].any()
    assert has_gaps[0, -1].any()  # the next head's queries come along
    assert has_gaps[1, -1].any()  # zeros behind the tensor do


@pytest.mark.parametrize("rise", [1.875, 7.75])
def test_sums_of_huge_values_are_finite(stages: ModuleType, rise: float) -> None:
    """Every key but those of the block that is listed first has the same score, `rise` larger in base 2."""
    case = Case("huge", (40,), (64 * 18,), 1, 2, 16, 18, 64, causal=False)
    problem, chunk = make_problem(case, torch.bfloat16), make_chunk(case)
    q, k, v = (torch.zeros_like(x) for x in (problem.q, problem.k, problem.v))
    q[..., 0], k[64:, :, 0] = 1, rise
    ids = torch.arange(18, dtype=torch.int32, device=DEVICE).expand_as(problem.topk_idx).contiguous()
    scale = stage_reference.LN_2
    problem = dataclasses.replace(problem, q=q, k=k, v=v + 2.0**127, topk_idx=ids, softmax_scale=scale)
    assert_shared(stages, problem, chunk, QUARTER_OF_A_TILE)


# ---------------------------------------------------------------------------------------------------------------------
# The whole forward
# ---------------------------------------------------------------------------------------------------------------------
SHARING = cases.Case("shares", (70, 90), num_kv_heads=1, group_size=4, head_dim=16, block_size=64, topk=2)
NEWEST, SM_80 = Target("cuda", torch.bfloat16), Target("cuda", torch.bfloat16, arch=80)


def run_forward(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The forward, compared with the reference; what record_shared_blocks tells of it."""
    inputs = case.inputs(torch.bfloat16, DEVICE)
    shared = record_shared_blocks(monkeypatch)
    out, lse = forward(inputs, "cuda")
    expected = expected_results(inputs)
    assert_close("out", out, expected["out"])
    assert_close("lse", lse, expected["lse"])
    return shared


def test_most_cases_of_a_gpu_share_blocks() -> None:
    """Those that all public results are compared for: the rule must not move away from them."""
    found = cases.cases(small=False)
    assert sum(case.group_size % 2 == 0 and case.block_size % 64 == 0 for case in found) > len(found) // 2


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("group_size", [2, 4, 6, 16])
def test_the_forward_shares_blocks(
    stages: ModuleType, group_size: int, block_size: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    case = dataclasses.replace(SHARING, group_size=group_size, block_size=block_size)
    (shared,) = run_forward(case, monkeypatch)
    assert shared > 0


def test_heads_that_are_one_in_memory(stages: ModuleType, poisoned_memory: None) -> None:
    inputs = dataclasses.replace(SHARING, num_kv_heads=2).inputs(torch.bfloat16, DEVICE)
    k, v = (x[:, :1].expand_as(x) for x in (inputs.k, inputs.v))
    expanded, written = (dataclasses.replace(inputs, k=x, v=y) for x, y in ((k, v), (k.contiguous(), v.contiguous())))
    for ours, theirs in zip(forward(expanded, "cuda"), forward(written, "cuda"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("target", "changes"),
    [(NEWEST, {"group_size": 1}), (NEWEST, {"group_size": 3}), (NEWEST, {"block_size": 32}), (SM_80, {})],
    ids=["group_size_1", "group_size_3", "block_size_32", "sm_80"],
)
def test_the_forward_does_not_share_blocks(
    target: Target, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    load_stages("cuda")
    assert run_forward(dataclasses.replace(SHARING, **changes), monkeypatch) == []


@pytest.mark.usefixtures("workspace_limit")
def test_the_forward_shares_no_blocks_where_the_limit_has_no_room(
    stages: ModuleType, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    fsa.set_workspace_limit(16_000)
    assert run_forward(SHARING, monkeypatch) == []
