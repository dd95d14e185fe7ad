"""Selections of KV blocks to measure with, from the worst locality to the best."""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("random", "trained", "coherent", "sink")

# Scores of a chunk of tokens, in elements: some temporaries of this size, in fp32, fit on any GPU.
_CHUNK_ELEMENTS = 1 << 26
# 'trained': weight of the taste that the tokens of a block share against each token's own Gumbel noise. Of the (token,
# block) pairs of 64 neighbouring tokens, 51 % at 16,384 tokens and 32 % at 65,536 then fall on blocks that at least
# half of them select, 69 % and 45 % on blocks that at least a quarter select. By layer, a byte-level NSA model trained
# on 16,384 tokens of source code has 22-49 % and 44-73 %. 'random' at 65,536 tokens: 20 % and 23 %.
_TRAINED_TASTE = 1.7
# 'coherent': a token's own noise against the shared taste. Neighbours agree on most blocks.
_COHERENT_NOISE = 0.15


def make_topk_idx(
    pattern: str,
    tokens: int,
    num_kv_heads: int,
    topk: int,
    block_size: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cuda",
) -> Tensor:
    """Draws causal selections for one sequence; every token has its first block, its own and the one before.

    Args:
        pattern: "random": every token draws alone. "trained": neighbours agree as they do in a trained model.
            "coherent": neighbours mostly agree. "sink": a few blocks are drawn by nearly every token.
        tokens: length of the sequence.
        num_kv_heads, topk, block_size: as in `fsa.selected_attention`.
        seed: of the draw.
        device: of the result; the draw differs between devices.

    Returns:
        int32 [num_kv_heads, tokens, topk]: sorted, no block twice, -1 at the end where blocks are fewer than slots.

    Raises:
        ValueError: the pattern is unknown.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {PATTERNS}, got {pattern!r}")
    generator = torch.Generator(device).manual_seed(seed)
    num_blocks = -(-tokens // block_size)
    block = torch.arange(num_blocks, device=device)
    step = max(1, _CHUNK_ELEMENTS // num_blocks)
    topk_idx = torch.full((num_kv_heads, tokens, topk), -1, dtype=torch.int32, device=device)
    for head in topk_idx:
        taste = _taste(pattern, num_blocks, generator)
        for chunk in torch.arange(tokens, device=device).split(step):
            own = chunk // block_size
            scores = _scores(pattern, taste, own, num_blocks, generator)
            forced = (block == 0) | ((block == own[:, None]) | (block == own[:, None] - 1))
            scores.masked_fill_(forced, torch.inf).masked_fill_(block > own[:, None], -torch.inf)
            score, selected = scores.topk(min(topk, num_blocks), dim=-1)
            selected = selected.masked_fill(score == -torch.inf, num_blocks).sort(dim=-1).values
            head[chunk, : selected.shape[1]] = selected.masked_fill(selected == num_blocks, -1).int()
    return topk_idx


def _taste(pattern: str, num_blocks: int, generator: torch.Generator) -> Tensor | None:
    """What the tokens of one head have in common: [block of the token, block], or one row for all tokens."""
    device = generator.device
    if pattern == "trained":
        return torch.randn(num_blocks, num_blocks, generator=generator, device=device)
    if pattern == "coherent":
        return torch.rand(num_blocks, num_blocks, generator=generator, device=device)
    if pattern == "sink":
        return 4 * torch.rand(1, num_blocks, generator=generator, device=device) ** 8
    return None


def _scores(pattern: str, taste: Tensor | None, own: Tensor, num_blocks: int, generator: torch.Generator) -> Tensor:
    """What each token thinks of each block: [tokens, blocks]."""
    noise = torch.rand(len(own), num_blocks, generator=generator, device=generator.device)
    if taste is None:
        return noise
    if pattern == "sink":
        return noise.add_(taste)
    if pattern == "coherent":
        return noise.mul_(_COHERENT_NOISE).add_(taste[own])
    gumbel = noise.clamp_(1e-9, 1 - 1e-7).log_().neg_().log_().neg_()
    return gumbel.add_(taste[own], alpha=_TRAINED_TASTE)
