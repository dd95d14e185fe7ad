"""Random shapes, selections and workspace limits, bounded, against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from cases import INT32_MAX, INT32_MIN, Case, repeated_blocks
from harness import DEVICE, HAS_GPU, LEAN_TARGETS, Target, run, skip_unless_usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Inputs
from tolerances import assert_results, expected_results
from torch import Generator

import fsa

# Triton compiles anew for other shapes on a GPU: there it keeps to a few.
_EXAMPLES = {"cuda": 60, "triton": 15 if HAS_GPU else 8, "reference": 30}
_MAX_LENGTH = 300 if HAS_GPU else 45
_HOSTILE = (-1, -2, 9, 1000, 2**26, 2**27, 2**27 + 1, INT32_MAX, INT32_MIN, -(2**27))


def _make_some_ids_hostile(inputs: Inputs, generator: Generator) -> Inputs:
    shape = inputs.topk_idx.shape
    drawn = torch.tensor(_HOSTILE, dtype=torch.int32)[torch.randint(len(_HOSTILE), shape, generator=generator)]
    return inputs.replace(topk_idx=drawn.where(torch.rand(shape, generator=generator) < 0.3, inputs.topk_idx))


@st.composite
def _cases(draw: st.DrawFn, few_shapes: bool) -> Case:
    lengths = draw(
        st.lists(st.tuples(st.integers(0, _MAX_LENGTH), st.integers(0, _MAX_LENGTH)), min_size=1, max_size=4)
    )
    same = draw(st.booleans())
    return Case(
        name=f"random-{draw(st.integers(0, 2**32))}",  # the seed of the values
        len_q=tuple(q for q, _ in lengths),
        len_k=tuple(q if same else k for q, k in lengths),
        num_kv_heads=draw(st.integers(1, 3)) if HAS_GPU else 1,
        group_size=draw(st.sampled_from([1, 3]) if few_shapes else st.integers(1, 20 if HAS_GPU else 5)),
        head_dim=64 if few_shapes else 8 * draw(st.integers(1, 32 if HAS_GPU else 6)),
        block_size=64 if few_shapes else draw(st.sampled_from([32, 64, 128, 256] if HAS_GPU else [32, 64])),
        topk=draw(st.integers(1, 40 if HAS_GPU else 5)),
        softmax_scale=draw(st.none() | st.floats(0.01, 1)),
        causal=True if few_shapes else draw(st.booleans()),
        select=repeated_blocks,
        edit=_make_some_ids_hostile,
    )


@pytest.mark.parametrize("target", LEAN_TARGETS, ids=str)
@pytest.mark.usefixtures("workspace_limit", "poisoned_memory")
@pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")
def test_random_problems(target: Target) -> None:
    skip_unless_usable(target.backend)

    @settings(
        max_examples=_EXAMPLES[target.backend],
        deadline=None,
        derandomize=True,  # the same examples everywhere: a failure is a failure for all
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=_cases(few_shapes=HAS_GPU and target.backend == "triton"),
        # Of a forward whose partials take some MiB (some 100 KiB without a GPU).
        limit=st.sampled_from([16, 64, 4096] if HAS_GPU else [1 / 4, 4]),
    )
    def check(case: Case, limit: float) -> None:
        inputs = case.inputs(target.dtype, DEVICE)
        fsa.set_workspace_limit(int(limit * 2**20))
        assert_results(run(inputs, target.backend), expected_results(inputs))

    check()
