"""The example of the published FSA package, unchanged in all its sizes: one layer, two sequences of 65,536 and 32,768.

    python examples/published_module.py

Needs a GPU. Prints the time of the forward and of the backward, and the peak memory, inputs and parameters included.
Source of the sizes: the README of github.com/Relaxed-System-Lab/Flash-Sparse-Attention.
"""

from __future__ import annotations

import statistics
import sys

import torch

from fsa.module.fsa import FlashSparseAttention, RopeConfig

_STEPS = 5


def main() -> None:
    """Runs it once to compile, then some times to measure."""
    if not torch.cuda.is_available():
        sys.exit("this example needs a CUDA device and found none")
    torch.manual_seed(0)
    attention = (
        FlashSparseAttention(
            hidden_size=4096,
            num_q_heads=4,
            num_kv_heads=4,
            head_dim=128,
            kernel_size=32,
            kernel_stride=16,
            block_size=64,
            topk=16,
            init_blocks=1,
            local_blocks=2,
            window_size=512,
            rope_config=RopeConfig(
                max_position_embeddings=131072,
                head_dim=128,
                rope_theta=500000,
                rope_scaling={
                    "factor": 8.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
            ),
        )
        .cuda()
        .to(torch.bfloat16)
    )
    cu_seqlens = torch.tensor([0, 65536, 98304], dtype=torch.int32, device="cuda")
    x = torch.randn(98304, 4096, device="cuda", dtype=torch.bfloat16)

    times = []
    for step in range(1 + _STEPS):
        if step == 1:  # the first one compiles
            torch.cuda.reset_peak_memory_stats()
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        y = attention(x, cu_seqlens)
        middle.record()
        loss = (y * torch.randn_like(y)).sum(-1).mean()
        loss.backward()
        end.record()
        end.synchronize()
        times.append((start.elapsed_time(middle), middle.elapsed_time(end)))
        finite = {name: parameter.grad.isfinite().all() for name, parameter in attention.named_parameters()}
        if not y.isfinite().all() or not all(finite.values()):
            sys.exit(f"not finite: the output, or one of the gradients {finite}")
        attention.zero_grad()
        del y, loss  # or the next step would have them beside its own
    forward, backward = (statistics.median(ms) for ms in zip(*times[1:], strict=True))
    print(
        f"published example on {torch.cuda.get_device_name()}: forward {forward:.1f} ms, loss and backward "
        f"{backward:.1f} ms (first step, which compiles: {sum(times[0]) / 1000:.1f} s); peak memory "
        f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
