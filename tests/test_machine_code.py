"""What ptxas made of the kernels, read from the built extension."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import fsa
from fsa import backends

EXTENSION = Path(fsa.__file__).with_name("_C.so")


@pytest.mark.skipif(
    "90a" not in backends.info().versions.get("extension", ""), reason="the extension is not built for sm_90a"
)
def test_descriptors_are_pairs_of_uniform_registers() -> None:
    """A pair begins at an even register; ptxas of CUDA 13.0 has put descriptors of cp.async elsewhere.

    That instruction is illegal on a GPU, and nothing says so before it runs: see gather_queries in
    csrc/forward/query_stage.cuh.
    """
    nvidia = pytest.importorskip("triton.backends.nvidia")
    disassembler = Path(nvidia.__path__[0], "bin", "cuobjdump")
    command = [disassembler, "-arch", "sm_90a", "-sass", EXTENSION]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    descriptors = [int(first) for first in re.findall(r"desc\[UR(\d+)\]", code)]
    assert descriptors, "no kernels of sm_90a"
    assert [first for first in descriptors if first % 2] == []
