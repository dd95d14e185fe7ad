"""The six stages in Triton: same names and signatures as in `fsa.stages_cuda`, which has two more of its own."""

from fsa.problem import Problem
from triton_ref.backward_main import backward_main
from triton_ref.backward_preprocess import backward_preprocess
from triton_ref.backward_reduce import backward_reduce
from triton_ref.forward_main import forward_main
from triton_ref.forward_reduce import forward_reduce
from triton_ref.plan import plan

__all__ = [
    "backward_main",
    "backward_preprocess",
    "backward_reduce",
    "forward_main",
    "forward_reduce",
    "plan",
    "shares_blocks",
]


def shares_blocks(problem: Problem) -> bool:
    """Never: the stages split and shared of the forward are an optimisation of the CUDA backend."""
    return False
