"""The definition of the module: Native Sparse Attention (arXiv 2502.11089) written from the paper's equations, dense.

Sequence by sequence, window by window, every attention a matrix over all its keys; nothing here calls fsa. Gradients
are autograd's. In float64 it is the exact answer; in another dtype it is what plain PyTorch makes of the same formulas,
the yardstick of the tolerance rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Sizes of the module, by the names of its arguments."""

    hidden_size: int = 48
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 4
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 24

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, eq=False)
class Scores:
    """Of one sequence: how much each query wants each block, [num_kv_heads, n, num_blocks], and which are forced."""

    scores: Tensor
    candidates: Tensor  # [n, num_blocks] bool: the blocks up to the query's own
    forced: Tensor  # [n, num_blocks] bool


# ---------------------------------------------------------------------------------------------------------------------
# Parts, each for one sequence of n tokens
# ---------------------------------------------------------------------------------------------------------------------
def window_starts(n: int, config: Config) -> range:
    """First tokens of the windows of a sequence."""
    return range(0, n - config.kernel_size + 1, config.kernel_stride)


def compress(x: Tensor, weight: Tensor | None, pe: Tensor | None, config: Config) -> Tensor:
    """Equation 7: [n, num_kv_heads, head_dim] -> [windows, num_kv_heads, head_dim]; the mean without a weight."""
    compressed = []
    for start in window_starts(len(x), config):
        window = x[start : start + config.kernel_size].transpose(0, 1)  # [heads, kernel_size, head_dim]
        if weight is None:
            compressed.append(window.mean(1))
            continue
        window = window if pe is None else window + pe
        compressed.append((window.flatten(1)[:, None] @ weight).squeeze(1))
    return torch.stack(compressed) if compressed else x[:0]


def angles(position: Tensor, theta: float, head_dim: int, scaling: Mapping[str, float] | None) -> Tensor:
    """[n] -> [n, head_dim / 2], radians in float64. Scaling is Llama 3.1's, in wavelengths as its authors wrote it."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is not None:
        context, low, high = (
            scaling[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        for i, old in enumerate(frequency.tolist()):
            wavelength = 2 * math.pi / old
            if wavelength > context / low:
                frequency[i] = old / scaling["factor"]
            elif wavelength >= context / high:
                smooth = (context / wavelength - low) / (high - low)
                frequency[i] = (1 - smooth) * old / scaling["factor"] + smooth * old
    return position.double()[:, None] * frequency.to(position.device)


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """[n, heads, head_dim] turned by [n, head_dim / 2]: the complex numbers x[i] + 1j * x[i + head_dim / 2]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    turn = torch.polar(torch.ones_like(angle), angle)[:, None].to(compute.to_complex())
    turned = torch.complex(x[..., :half].to(compute), x[..., half:].to(compute)) * turn
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """out [n, num_q_heads, head_dim] and probabilities [num_q_heads, n, m]; visible is [num_q_heads or 1, n, m]."""
    group_size = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.repeat_interleave(group_size, 1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.mT) * q.shape[-1] ** -0.5
    compute = torch.promote_types(scores.dtype, torch.float32)
    probs = torch.softmax(torch.where(visible, scores.to(compute), -torch.inf), -1)
    probs = torch.where(visible.any(-1, keepdim=True), probs, 0)
    return (probs.to(v.dtype) @ v).transpose(0, 1), probs


def block_scores(probs: Tensor, n: int, config: Config) -> Scores:
    """Equations 9 and 10: probabilities [num_q_heads, n, windows] -> what each query wants of each block.

    A window counts for a block as often as it has whole strides inside of it.
    """
    blocks = -(-n // config.block_size)
    starts = window_starts(n, config)
    overlap = torch.zeros((len(starts), blocks), dtype=torch.float64, device=probs.device)
    for w, start in enumerate(starts):
        for block in range(blocks):
            begin = max(start, block * config.block_size)
            end = min(start + config.kernel_size, (block + 1) * config.block_size)
            overlap[w, block] = max(end - begin, 0) / config.kernel_stride
    grouped = probs.detach().double().unflatten(0, (-1, config.group_size)).sum(1)
    own = torch.arange(n, device=probs.device)[:, None] // config.block_size
    block = torch.arange(blocks, device=probs.device)
    candidates = block <= own
    forced = candidates & ((block < config.init_blocks) | (own - block < config.local_blocks))
    return Scores(grouped @ overlap, candidates, forced)


def highest_blocks(scores: Scores, config: Config) -> Tensor:
    """[num_kv_heads, n, topk] int32: forced blocks, then by falling score, then by rising id; listed by rising id."""
    heads, n, blocks = scores.scores.shape
    topk_idx = torch.full((heads, n, config.topk), -1, dtype=torch.int32)
    values, candidates, forced = (x.tolist() for x in (scores.scores, scores.candidates, scores.forced))
    for head in range(heads):
        for query in range(n):
            allowed = [block for block in range(blocks) if candidates[query][block]]
            allowed.sort(key=lambda block: (not forced[query][block], -values[head][query][block], block))  # noqa: B023
            taken = sorted(allowed[: config.topk])
            topk_idx[head, query, : len(taken)] = torch.tensor(taken, dtype=torch.int32)
    return topk_idx.to(scores.scores.device)


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------
def _attend_sequence(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    config: Config,
    rope: tuple[float, Mapping[str, float] | None],
    topk_idx: Tensor | None,
) -> tuple[Tensor, Scores, Tensor]:
    n, dim = len(x), config.head_dim
    q, k, v = ((x @ parameters[f"proj_{name}.weight"].T).unflatten(-1, (-1, dim)) for name in "qkv")
    position = torch.arange(n, device=x.device)
    starts = torch.tensor(window_starts(n, config), dtype=torch.int64, device=x.device)
    weights = (parameters.get(name) for name in ("compress_key", "compress_value"))
    compressed_k, compressed_v = (
        compress(tokens, weight, pe, config)
        for tokens, weight, pe in zip((k, v), weights, (parameters.get("intra_block_pe"), None), strict=True)
    )
    q, k = (rotated(tokens, angles(position, rope[0], dim, rope[1])) for tokens in (q, k))
    compressed_k = rotated(compressed_k, angles(starts, rope[0], dim, rope[1]))

    complete = starts + config.kernel_size - 1 <= position[:, None]  # [n, windows]
    compressed, probs = attend(q, compressed_k, compressed_v, complete[None])
    scores = block_scores(probs, n, config)
    topk_idx = highest_blocks(scores, config) if topk_idx is None else topk_idx

    causal = position <= position[:, None]
    in_selected = (topk_idx[..., None].long() == position // config.block_size).any(2)  # [num_kv_heads, n, n]
    selected, _ = attend(q, k, v, (in_selected & causal).repeat_interleave(config.group_size, 0))
    recent = causal & (position > position[:, None] - config.window_size)
    sliding, _ = attend(q, k, v, recent[None])

    gates = torch.sigmoid(x @ parameters["gate.0.weight"].T).unflatten(-1, (3, -1))  # [n, 3, 1 or num_q_heads]
    branches = torch.stack((compressed, selected, sliding), 1)  # [n, 3, num_q_heads, head_dim]
    out = (gates[..., None] * branches).sum(1)
    return out.flatten(1) @ parameters["proj_o.weight"].T, scores, topk_idx


def dense_module(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    lengths: Sequence[int],
    config: Config,
    rope: tuple[float, Mapping[str, float] | None],
    topk_idx: Tensor | None = None,
) -> tuple[Tensor, list[Scores], Tensor]:
    """The module's output [total, hidden_size], the block scores of every sequence, and topk_idx.

    Args:
        parameters: by their names in the state dict; mean pooling where there is no compress_key.
        x: [total, hidden_size], sequences of these lengths one after the other.
        rope: rope_theta, and the numbers of Llama 3's scaling or None.
        topk_idx: [num_kv_heads, total, topk], taken instead of the selection that the scores give.
    """
    found = []
    given = [None] * len(lengths) if topk_idx is None else topk_idx.split(list(lengths), 1)
    for tokens, blocks in zip(x.split(list(lengths)), given, strict=True):
        found.append(_attend_sequence(parameters, tokens, config, rope, blocks))
    outs, scores, selections = zip(*found, strict=True)
    return torch.cat(outs), list(scores), torch.cat(selections, 1)
