"""A small Llama-style language model (RMSNorm, RoPE, SwiGLU, grouped queries) whose attention is the op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import fsa


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its attention."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    context: int  # longest document, in tokens
    block_size: int  # keys per selected block
    topk: int  # blocks that each query attends to

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class Layout:
    """Where the packed documents lie. The queries of a document are its last tokens; its keys are all of them."""

    cu_seqlens_q: Tensor  # [batch + 1], int32
    cu_seqlens_k: Tensor  # [batch + 1], int32
    position: Tensor  # [total_q], of each query in its document
    block_of_key: Tensor  # [total_k], block of each key, counted over all documents
    block_length: Tensor  # [blocks], keys of each block
    first_block: Tensor  # [total_q], first block of each query's document, counted over all documents
    selection_bias: Tensor  # [total_q, blocks]: inf = always selected, -inf = never, 0 = by score

    @classmethod
    def of(cls, lengths_q: list[int], lengths_k: list[int], block_size: int, device: torch.device) -> Layout:
        """Lays out documents of `lengths_k` tokens, of which the last `lengths_q` are queries."""
        queries, keys = torch.tensor(lengths_q), torch.tensor(lengths_k)
        blocks = (keys + block_size - 1) // block_size
        start_k, start_block = keys.cumsum(0) - keys, blocks.cumsum(0) - blocks
        end_q = queries.cumsum(0)
        num_blocks = int(blocks.sum())

        document_of_query = torch.arange(len(queries)).repeat_interleave(queries).to(device)
        document_of_key = torch.arange(len(keys)).repeat_interleave(keys).to(device)
        token = torch.arange(int(end_q[-1]), device=device)
        position = token + (keys - end_q).to(device)[document_of_query]
        position_k = torch.arange(int(keys.sum()), device=device) - start_k.to(device)[document_of_key]
        block_of_key = start_block.to(device)[document_of_key] + position_k // block_size
        first_block = start_block.to(device)[document_of_query]

        # A query may attend to its own block and to the blocks before it, which are complete: the mean of their keys
        # tells it nothing about tokens to come. The first block, its own and the one before it are always selected.
        block = torch.arange(num_blocks, device=device)
        first, own = first_block[:, None], (first_block + position // block_size)[:, None]
        bias = torch.zeros(len(token), num_blocks, device=device)
        bias.masked_fill_((block == first) | (block == own) | (block == own - 1), float("inf"))
        bias.masked_fill_((block < first) | (block > own), float("-inf"))
        return cls(
            cu_seqlens_q=_prefix_sum(queries).to(device),
            cu_seqlens_k=_prefix_sum(keys).to(device),
            position=position,
            block_of_key=block_of_key,
            block_length=torch.zeros(num_blocks, device=device).index_add_(
                0, block_of_key, torch.ones(len(block_of_key), device=device)
            ),
            first_block=first_block,
            selection_bias=bias,
        )


def _prefix_sum(lengths: Tensor) -> Tensor:
    return functional.pad(lengths.cumsum(0), (1, 0)).int()


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, layout: Layout, topk: int) -> Tensor:
    """Chooses, for each query and KV head, the blocks whose mean key scores highest with the group's queries.

    q is [total_q, num_heads, head_dim], k [total_k, num_kv_heads, head_dim]. Returns int32 [num_kv_heads, total_q,
    topk], block ids inside the query's document, -1 where there are fewer blocks than slots.
    """
    total_q, num_blocks = layout.selection_bias.shape
    group_sum = q.unflatten(1, (k.shape[1], -1)).sum(2).transpose(0, 1)  # [num_kv_heads, total_q, head_dim]
    sums = torch.zeros(num_blocks, *k.shape[1:], device=k.device).index_add_(0, layout.block_of_key, k.float())
    mean_keys = (sums / layout.block_length[:, None, None]).to(q.dtype)
    scores = group_sum @ mean_keys.permute(1, 2, 0) + layout.selection_bias  # [num_kv_heads, total_q, blocks]
    score, block = scores.topk(min(topk, num_blocks), dim=-1)
    block = (block - layout.first_block[:, None]).masked_fill(score == float("-inf"), -1)
    return functional.pad(block, (0, topk - block.shape[-1]), value=-1).int()


class Cache:
    """Keys and values of one document, layer by layer, so that a new token costs one query."""

    def __init__(self, num_layers: int) -> None:
        """Starts empty."""
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new tokens; returns those of all tokens."""
        previous = self.layers[layer]
        if previous is not None:
            k, v = torch.cat([previous[0], k]), torch.cat([previous[1], v])
        self.layers[layer] = k, v
        return k, v


class Rope(nn.Module):
    """Rotary position embedding: rotates pairs (i, i + head_dim / 2) by an angle that grows with the position."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context: int, base: float = 10_000.0) -> None:
        """Tabulates the angles of `context` positions."""
        super().__init__()
        frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.outer(torch.arange(context), frequency)[:, None]  # [context, 1, head_dim / 2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotates x [tokens, heads, head_dim]; keeps its dtype."""
        cos, sin = self.cos[position], self.sin[position]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Selected attention with grouped queries."""

    def __init__(self, config: Config) -> None:
        """Makes the projections."""
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.rope = Rope(config.head_dim, config.context)

    def project(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim] of x [tokens, dim]."""
        c = self.config
        heads = self.qkv(x).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        return self.rope(q, layout.position), self.rope(k, layout.position), v

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None, layer: int) -> Tensor:
        """Attends; x is [tokens, dim]."""
        q, k, v = self.project(x, layout)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        topk_idx = select_blocks(q, k, layout, self.config.topk)
        attended = fsa.selected_attention(
            q, k, v, topk_idx, layout.cu_seqlens_q, layout.cu_seqlens_k, block_size=self.config.block_size
        )
        return self.out(attended.flatten(1))


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
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGlu(config.dim)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None, layer: int) -> Tensor:
        """x is [tokens, dim]."""
        x = x + self.attention(self.attention_norm(x), layout, cache, layer)
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
            if parameter.dim() == 2:
                writes_residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * config.num_layers) ** 0.5 if writes_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Logits [total_q, vocab_size] of tokens [total_q], int64. A cache holds the tokens before these."""
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, layout, cache, i)
        return self.head(self.norm(x))
