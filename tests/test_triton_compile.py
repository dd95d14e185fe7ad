"""Every Triton kernel compiles for sm80 and sm90, bf16 included, and fits their shared memory. Needs no GPU.

The interpreter accepts what the compiler does not, so this file runs itself as a script, in a Triton that compiles and
never launches: the pipeline runs as usual, on tensors of the CPU that no kernel touches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 90: 227 * KIB}  # that a CTA may have
# Of the six stages; of compressed attention (forward, dq, dkv, reduce) and selection (two); of the gated sum (forward,
# backward) and RoPE; of the search for windows (two).
NUM_KERNELS = 8 + 6 + 3 + 2
BF16 = ("bfloat16", 128, 64, 4, 16)  # dtype, head_dim, block_size, group_size, topk
FP16 = ("float16", 72, 256, 1, 1)
FP32 = ("float32", 64, 32, 3, 7)


@pytest.mark.parametrize(("capability", "signature"), [(80, BF16), (90, BF16), (90, FP16), (80, FP32)], ids=str)
def test_every_kernel_compiles(capability: int, signature: tuple[str, int, int, int, int], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compiles, whatever was compiled before
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__, str(capability), *map(str, signature)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = dict(line.split() for line in done.stdout.splitlines())
    assert len(kernels) == NUM_KERNELS
    for name, shared in kernels.items():
        assert int(shared) <= SHARED_MEMORY[capability], f"{name} needs {shared} bytes of shared memory"


def compile_kernels(capability: int, dtype: str, head_dim: int, block_size: int, group_size: int, topk: int) -> None:
    """Prints every kernel's name and its bytes of shared memory."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fsa import pipeline
    from fsa.module import (
        triton_compressed_attention,
        triton_find_windows,
        triton_gated_sum,
        triton_rope,
        triton_selection,
        triton_windows,
    )
    from fsa.problem import Problem
    from triton_ref import stages

    class CompileOnly:
        """What Triton asks of a driver until it launches."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    launch = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, **options: Any) -> None:
        kernel = launch(self, *arguments, **{**options, "warmup": True})
        print(self.__name__, kernel.metadata.shared)

    driver.set_active(CompileOnly())
    JITFunction.run = compile_only

    total, num_kv_heads = 256, 2
    q = torch.zeros(total, num_kv_heads * group_size, head_dim, dtype=getattr(torch, dtype))
    k = torch.zeros(total, num_kv_heads, head_dim, dtype=q.dtype)
    topk_idx = torch.zeros(num_kv_heads, total, topk, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 100, total], dtype=torch.int32)
    problem = Problem(q, k, k, topk_idx, cu_seqlens, cu_seqlens, block_size, head_dim**-0.5, causal=True)
    out, lse = pipeline.forward(problem, stages)
    pipeline.backward(problem, stages, out, lse, dout=q, dlse=None)

    triton_find_windows.find_windows(cu_seqlens, total, 32, 16)
    triton_windows.uses_wgmma = lambda device: capability >= 90
    compressed = (k[: total // 16], k[: total // 16])
    sequences = (cu_seqlens, cu_seqlens // 16)
    scale = head_dim**-0.5
    out, lse = triton_compressed_attention.forward(q, *compressed, *sequences, 32, 16, scale)
    triton_compressed_attention.backward(q, None, q, *compressed, out, lse, *sequences, 32, 16, scale)
    triton_selection.select_blocks(q, compressed[0], lse, *sequences, 32, 16, block_size, topk, 0, 1, scale)

    table = torch.zeros(total, 1, head_dim // 2)
    triton_rope.rotate(q, table, table, inverse=topk > 1)
    gates = q.new_zeros((total, 3 * q.shape[1] if topk > 1 else 3))
    triton_gated_sum.forward(gates, q, q, q)
    triton_gated_sum.backward(q, gates, q, q, q)


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
