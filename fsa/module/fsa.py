"""`FlashSparseAttention`: Native Sparse Attention as a layer, in place of an attention layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import selected_attention
from . import checks
from .compressed_attention import compressed_attention
from .compression import Windows, find_windows, linear_compression, mean_pooling
from .gated_sum import gated_sum
from .rope import RopeConfig, RotaryEmbedding, rotate
from .selection import select_blocks
from .sliding_window import sliding_window_attention


class FlashSparseAttention(nn.Module):
    """Native Sparse Attention (arXiv 2502.11089) from hidden states to hidden states, on packed sequences.

    Every token attends in three ways, and a gate weighs the results: to compressed keys, each of which stands for a
    window of `kernel_size` tokens; to all tokens of the `topk` blocks that the compressed keys point at; and to the
    last `window_size` tokens. The cost of a token grows with the length of its sequence only through the compressed
    keys, of which there is one every `kernel_stride` tokens.

    Constructor, parameters and state dict are those of the published FSA module (arXiv 2508.18224), so its checkpoints
    load. Three things differ, none of them in the state dict: the sliding window is `window_size` tokens, the token
    itself among them (published: one more); cosines and sines are not rounded to half precision; and the compression
    weights of a new module are initialised as the linear map that they are, one a head (published: Xavier over the
    whole tensor, which starts about sqrt(head_dim) times too small).

    Nothing waits for the GPU. Forward and backward give the same bits every time; on a GPU the backward only under
    `torch.use_deterministic_algorithms(True)`, since torch's sliding window, and cuDNN where it attends to compressed
    keys (`compressed_attention`), add up dq in any order otherwise.

    Args:
        hidden_size: elements of a token outside of the module.
        num_q_heads, num_kv_heads: query heads, a multiple of the KV heads. Each group shares a selection.
        head_dim: elements of a head, a multiple of 8 up to 256.
        kernel_size: tokens of a compression window, a multiple of kernel_stride, at most block_size.
        kernel_stride: tokens from one window's start to the next one's.
        block_size: keys of a selected block: 32, 64, 128 or 256.
        topk: blocks that a token selects, init_blocks + local_blocks to 512.
        init_blocks, local_blocks: blocks always selected, at the start of the sequence and up to the token's own.
        window_size: tokens of the sliding window.
        rope_config: rotary embedding; its head_dim is that of the module.
        compression: "linear" (learned, as published) or "mean" (of the window's tokens; no parameters).
        gate: "token", one gate a token and branch, as published, or "head", one a head, token and branch.
        backend: "auto", "cuda" (selected attention on the CUDA kernels or an error, the rest as in "auto", which
            selects blocks by CUDA kernels where there are some), "triton" or "reference" (plain PyTorch, for
            comparison).

    Raises:
        TypeError, ValueError: an argument that cannot be; the message says what to pass.

    Example:
        >>> import torch
        >>> from fsa import FlashSparseAttention, RopeConfig
        >>> attention = FlashSparseAttention(
        ...     hidden_size=64, num_q_heads=4, num_kv_heads=2, head_dim=16, kernel_size=32, kernel_stride=16,
        ...     block_size=64, topk=4, init_blocks=1, local_blocks=2, window_size=64,
        ...     rope_config=RopeConfig(head_dim=16),
        ... )
        >>> cu_seqlens = torch.tensor([0, 300, 512], dtype=torch.int32)  # two sequences of 300 and 212 tokens
        >>> attention(torch.randn(512, 64), cu_seqlens).shape
        torch.Size([512, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        block_size: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        window_size: int,
        rope_config: RopeConfig,
        *,
        compression: str = "linear",
        gate: str = "token",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.check_module(hidden_size, num_q_heads, num_kv_heads, head_dim, window_size, rope_config)
        checks.check_windows(kernel_size, kernel_stride)
        checks.check_selection(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
        checks.check_choice("compression", compression, checks.COMPRESSIONS)
        checks.check_choice("gate", gate, checks.GATES)
        checks.check_choice("backend", backend, checks.CUDA_BACKENDS)
        self.hidden_size = hidden_size
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kernel_size = kernel_size
        self.kernel_stride = kernel_stride
        self.block_size = block_size
        self.topk = topk
        self.init_blocks = init_blocks
        self.local_blocks = local_blocks
        self.window_size = window_size
        self.rope_config = rope_config
        self.compression = compression
        self.backend = backend

        self.proj_q = nn.Linear(hidden_size, num_q_heads * head_dim, bias=False)
        self.proj_k = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.proj_v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.proj_o = nn.Linear(num_q_heads * head_dim, hidden_size, bias=False)
        if compression == "linear":
            rows = kernel_size * head_dim
            self.compress_key = nn.Parameter(torch.empty(num_kv_heads, rows, head_dim))
            self.compress_value = nn.Parameter(torch.empty(num_kv_heads, rows, head_dim))
            self.intra_block_pe = nn.Parameter(torch.empty(num_kv_heads, kernel_size, head_dim))
        gates = 1 if gate == "token" else num_q_heads
        self.gate = nn.Sequential(nn.Linear(hidden_size, 3 * gates, bias=False), nn.Sigmoid())
        self.rope = RotaryEmbedding(rope_config)
        self.init_params()

    def init_params(self) -> None:
        """Xavier uniform initialisation of every parameter; those of the compression by head."""
        for parameter in self.parameters():
            bound = math.sqrt(6 / sum(parameter.shape[-2:]))
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """Attention over packed sequences.

        Args:
            x: [total, hidden_size], all sequences one after the other, dtype of the parameters (any under autocast).
            cu_seqlens: [batch + 1], integers, where sequences begin, and the total.
            max_seqlen: a bound on the length of the sequences; None: total. A close one spares the sliding window on a
                GPU some empty thread blocks.

        Returns:
            [total, hidden_size], dtype of x, or autocast's.
        """
        checks.check_input(x, self.hidden_size, self.proj_q.weight)
        checks.check_sequences(cu_seqlens)  # before the projections, too
        q = self.proj_q(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = self.proj_k(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.proj_v(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        out = self.attend(q, k, v, self.gate(x), cu_seqlens, max_seqlen)
        projected: Tensor = self.proj_o(out.flatten(1))
        return projected

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """The module without its projections.

        Args:
            q: [total, num_q_heads, head_dim], before RoPE.
            k, v: [total, num_kv_heads, head_dim], before RoPE, dtype of q.
            gates: [total, 3] or [total, 3 * num_q_heads], of compressed, selected and sliding-window attention.
            cu_seqlens, max_seqlen: as in `forward`.

        Returns:
            [total, num_q_heads, head_dim], dtype of q, or autocast's.
        """
        checks.check_sequences(cu_seqlens)
        cu_seqlens = cu_seqlens.int()
        backend, total = "auto" if self.backend == "cuda" else self.backend, q.shape[0]
        windows = find_windows(cu_seqlens, total, self.kernel_size, self.kernel_stride, backend=backend)
        compressed_k, compressed_v = self.compress(k, v, windows)  # before RoPE
        cosine, sine = self.rope(windows.positions, q.dtype)
        q, k = (rotate(x, cosine[:total], sine[:total], backend=backend) for x in (q, k))
        compressed_k = rotate(compressed_k, cosine[total:], sine[total:], backend=backend)

        sizes = {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}
        compressed, lse = compressed_attention(
            q, compressed_k, compressed_v, cu_seqlens, windows.cu_seqlens, **sizes, backend=backend
        )
        topk_idx = select_blocks(
            q, compressed_k, lse, cu_seqlens, windows.cu_seqlens, **sizes, block_size=self.block_size, topk=self.topk,
            init_blocks=self.init_blocks, local_blocks=self.local_blocks, backend=backend,
        )  # fmt: skip
        selected = selected_attention(q, k, v, topk_idx, cu_seqlens, block_size=self.block_size, backend=self.backend)
        sliding = sliding_window_attention(
            q, k, v, cu_seqlens, window_size=self.window_size, max_seqlen=max_seqlen,
            backend="reference" if self.backend == "reference" else "auto",
        )  # fmt: skip
        return gated_sum(gates, compressed, selected, sliding, backend=backend)

    def compress(self, k: Tensor, v: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        """Keys (before RoPE) and values of all windows.

        Args:
            k, v: [total, num_kv_heads, head_dim].
            windows: of the sequences, from `find_windows`.

        Returns:
            Two of [total // kernel_stride, num_kv_heads, head_dim].
        """
        if self.compression == "mean":
            key, value = (mean_pooling(x, windows, self.kernel_size, self.kernel_stride) for x in (k, v))
            return key, value
        key = linear_compression(k, self.compress_key, windows, self.kernel_stride, self.intra_block_pe)
        return key, linear_compression(v, self.compress_value, windows, self.kernel_stride)

    def extra_repr(self) -> str:
        """What the parts of the module do not show."""
        names = "kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks", "window_size"
        shown = [f"{name}={getattr(self, name)}" for name in (*names, "compression", "backend")]
        return ", ".join(shown)
