"""A short matrix of shapes through the CUDA kernels, selected attention and selection, for NVIDIA's compute-sanitizer:

    for tool in memcheck racecheck initcheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitize.py
    done

Without the caching allocator every tensor is an allocation of its own: with it, an access past the end of a tensor
falls into a neighbour or into unused memory of the same pool and nobody notices. The script sets the variable itself
where it is missing.

`--backend triton` (or `reference`) runs the same on another backend, on a machine without a GPU too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch first allocates on a GPU

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import selection_cases
from cases import Case, cases, first_block_by_all
from harness import DEVICE, run
from reference import Results
from tolerances import complaint, expected_results

import fsa
from fsa.module import cuda_selection

_KIBIBYTE = 1024
_LENGTHS = (75, 0, 1, 40)
# (case, workspace limit): every head_dim and block size that has kernels of its own, then what is special.
MATRIX = [
    *((Case(f"head_dim_{d}", _LENGTHS, head_dim=d, group_size=3), None) for d in (8, 32, 64, 96, 128, 192, 256)),
    *((Case(f"block_size_{b}", (300, 20), head_dim=d, block_size=b), None) for b in (64, 128, 256) for d in (64, 256)),
    *((Case(f"group_size_{g}", _LENGTHS, group_size=g), None) for g in (1, 7, 16)),
    # Enough queries for some blocks to be shared by a query tile
    *((Case(f"shared_{d}", (300, 20), head_dim=d, block_size=64, group_size=4), None) for d in (64, 96, 128, 192, 256)),
    (Case("shared_by_six_heads", (300, 20), head_dim=128, block_size=128, group_size=6), None),
    (Case("block_selected_by_all", (300,), group_size=16, topk=2, select=first_block_by_all), None),
    (Case("chunks", (200, 33), num_kv_heads=3, group_size=4, head_dim=64, block_size=64), 400 * _KIBIBYTE),
]
_SPECIAL = ("more_keys", "fewer_keys", "not_causal", "repeated_slots", "ids_out_of_range", "fused_qkv", "misaligned")
_SPECIAL += ("tokens_outside_sequences", "nonfinite_next_sequence", "nan_seen_by_some_v", "expanded_gradients")
_SPECIAL_CASES = [case for case in cases(small=True) if case.name in _SPECIAL]
MATRIX += [(case, None) for case in _SPECIAL_CASES]
MATRIX += [
    (dataclasses.replace(case, name=f"shared_{case.name}", group_size=4, block_size=64), None)
    for case in _SPECIAL_CASES
]


def main() -> int:
    """Runs the matrix; returns the number of problems whose results are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", choices=["cuda", "triton", "reference"])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    options = parser.parse_args()
    obstacle = cuda_selection.obstacle(DEVICE, 16, 64) if options.backend == "cuda" else ""
    selections = [] if obstacle else selection_cases.CUDA_CASES
    if obstacle:
        print(f"without selections: {obstacle}")
    default_limit, wrong = fsa.get_workspace_limit(), 0
    for name in options.dtypes:
        for case, limit in MATRIX:
            begin = time.perf_counter()
            inputs = case.inputs(getattr(torch, name))
            fsa.set_workspace_limit(limit or default_limit)
            # Only the backend runs on the device: what is expected is computed on the CPU.
            results = run(case.layout(inputs.map(lambda x: x.to(DEVICE))), options.backend)
            found = Results(**{key: x.cpu() for key, x in vars(results).items()})
            texts = [complaint(key, getattr(found, key), wanted) for key, wanted in expected_results(inputs).items()]
            problems = [text for text in texts if text]
            wrong += bool(problems)
            verdict = "; ".join(problems) or "right"
            print(f"{case.name:<26} {name:<9} {time.perf_counter() - begin:6.2f} s  {verdict}", flush=True)
        wrong += check_selection(options.backend, getattr(torch, name), selections)
    print(f"{wrong} of {len(options.dtypes) * (len(MATRIX) + len(selections))} wrong")
    return wrong


def check_selection(backend: str, dtype: torch.dtype, selections: list[selection_cases.Case]) -> int:
    """Block selection; returns the number of cases that are wrong."""
    wrong = 0
    for case in selections:
        begin = time.perf_counter()
        problem = selection_cases.make(dataclasses.replace(case, dtype=dtype))
        topk_idx, verdict = problem.select(backend), "right"
        try:
            selection_cases.assert_selected(topk_idx, problem)
        except AssertionError as error:
            verdict = f"topk_idx: {error}"
        wrong += verdict != "right"
        print(f"{case.name:<26} {dtype!s:<9} {time.perf_counter() - begin:6.2f} s  {verdict}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
