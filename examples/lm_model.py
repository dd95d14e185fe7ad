"""A small Llama-style language model (RMSNorm, SwiGLU, grouped queries) whose attention is the module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsa import FlashSparseAttention, RopeConfig


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its attention."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    context: int  # longest document, in tokens
    kernel_size: int  # tokens of a compression window
    kernel_stride: int  # tokens from one window's start to the next one's
    block_size: int  # keys of a selected block
    topk: int  # blocks that each token selects
    window_size: int  # tokens of the sliding window

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.dim // self.num_heads

    def attention(self) -> FlashSparseAttention:
        """The attention of one layer; the first block, the token's own and the one before it are always selected."""
        return FlashSparseAttention(
            hidden_size=self.dim,
            num_q_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            block_size=self.block_size,
            topk=self.topk,
            init_blocks=1,
            local_blocks=2,
            window_size=self.window_size,
            rope_config=RopeConfig(head_dim=self.head_dim, rope_theta=10_000.0, rope_scaling=None),
        )


@dataclass(frozen=True)
class Layout:
    """Where packed documents lie."""

    cu_seqlens: Tensor  # [batch + 1], int32: where documents begin, and the total
    max_seqlen: int  # tokens of the longest document

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Layout:
        """Lays out documents one behind the other."""
        bounds = functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        return cls(bounds.int().to(device), max(lengths))


class SwiGlu(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, dim: int) -> None:
        """Makes the projections; the hidden width is 8/3 dim, rounded up to 32."""
        super().__init__()
        hidden = -(-8 * dim // 3 // 32) * 32
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x is [tokens, dim]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside the residual."""

    def __init__(self, config: Config) -> None:
        """Makes both parts."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = config.attention()
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGlu(config.dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x is [tokens, dim]."""
        x = x + self.attention(self.attention_norm(x), layout.cu_seqlens, layout.max_seqlen)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: Config) -> None:
        """Initialises as GPT-2 did: small weights, smaller still where they write to the residual."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # the compression's parameters are not: the module has initialised them
                writes_residual = name.endswith(("proj_o.weight", "down.weight"))
                std = 0.02 / (2 * config.num_layers) ** 0.5 if writes_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Logits [tokens, vocab_size] of tokens [tokens], int64."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, layout)
        return self.head(self.norm(x))
