"""Named cases that every backend must get right: small problems, each with one thing that is easy to get wrong.

`cases(small=True)` is sized for Triton's interpreter (some dozens of tokens), `cases(small=False)` for a GPU.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from reference import Inputs
from torch import Generator, Tensor

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
HALF = (torch.float16, torch.bfloat16)
ANY = (*HALF, torch.float32, torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Selections
# ---------------------------------------------------------------------------------------------------------------------
def visible_blocks(len_q: int, len_k: int, block_size: int, causal: bool) -> Tensor:
    """[len_q]: of how many blocks each query of a sequence sees a key."""
    last_key = torch.arange(len_q) + len_k - len_q if causal else torch.full((len_q,), len_k - 1)
    return last_key.div(block_size, rounding_mode="floor").clamp(min=-1) + 1


def distinct_blocks(rows: int, visible: Tensor, num_blocks: int, topk: int, generator: Generator) -> Tensor:
    """Distinct visible blocks in any order; about one slot in ten is unused, besides those for want of blocks."""
    score = torch.rand((rows, len(visible), num_blocks), generator=generator)
    score = score.masked_fill(torch.arange(num_blocks) >= visible[:, None], -1)
    drawn, block = score.topk(min(topk, num_blocks), dim=-1)
    unused = (drawn < 0) | (torch.rand(block.shape, generator=generator) < 0.1)
    slots = torch.full((rows, len(visible), topk), -1)
    slots[..., : block.shape[-1]] = block.masked_fill(unused, -1)
    return slots.gather(-1, torch.rand(slots.shape, generator=generator).argsort(-1))


def repeated_blocks(rows: int, visible: Tensor, num_blocks: int, topk: int, generator: Generator) -> Tensor:
    """Every slot by itself draws a visible block, or is unused where there is none."""
    draw = torch.rand((rows, len(visible), topk), generator=generator)
    return (draw * visible[:, None]).long().where(visible[:, None] > 0, -1)


def any_blocks(rows: int, visible: Tensor, num_blocks: int, topk: int, generator: Generator) -> Tensor:
    """Blocks of the whole sequence, those in the query's future too."""
    return torch.randint(-1, max(num_blocks, 1), (rows, len(visible), topk), generator=generator)


def nothing(rows: int, visible: Tensor, num_blocks: int, topk: int, generator: Generator) -> Tensor:
    """All slots unused."""
    return torch.full((rows, len(visible), topk), -1)


def first_block_by_all(rows: int, visible: Tensor, num_blocks: int, topk: int, generator: Generator) -> Tensor:
    """Block 0 is selected by every query, in any slot, once."""
    slots = distinct_blocks(rows, visible, num_blocks, topk, generator)
    slots = slots.masked_fill(slots == 0, -1)
    slots[..., 0] = 0
    return slots.gather(-1, torch.rand(slots.shape, generator=generator).argsort(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A problem by its shape, how blocks are selected, and what is changed afterwards."""

    name: str
    len_q: tuple[int, ...]
    len_k: tuple[int, ...] | None = None  # None: like len_q
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 32
    block_size: int = 32
    topk: int = 4
    softmax_scale: float | None = None
    causal: bool = True
    select: Callable[[int, Tensor, int, int, Generator], Tensor] = distinct_blocks
    edit: Callable[[Inputs, Generator], Inputs] = lambda inputs, _: inputs  # of values
    layout: Callable[[Inputs], Inputs] = lambda inputs: inputs  # same values, other strides
    dtypes: tuple[torch.dtype, ...] = ANY

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
        """The problem; the same values in every run."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        len_k = self.len_q if self.len_k is None else self.len_k
        total_q, total_k, num_heads = sum(self.len_q), sum(len_k), self.num_kv_heads * self.group_size

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def select(q: int, k: int) -> Tensor:
            visible, num_blocks = visible_blocks(q, k, self.block_size, self.causal), -(-k // self.block_size)
            return self.select(self.num_kv_heads, visible, num_blocks, self.topk, generator)

        inputs = Inputs(
            q=randn(total_q, num_heads, self.head_dim).to(dtype),
            k=randn(total_k, self.num_kv_heads, self.head_dim).to(dtype),
            v=randn(total_k, self.num_kv_heads, self.head_dim).to(dtype),
            topk_idx=torch.cat([select(q, k) for q, k in zip(self.len_q, len_k, strict=True)], 1).int(),
            cu_seqlens_q=torch.tensor([0, *itertools.accumulate(self.len_q)], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, *itertools.accumulate(len_k)], dtype=torch.int32),
            block_size=self.block_size,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            dout=randn(total_q, num_heads, self.head_dim).to(dtype),
            dlse=randn(num_heads, total_q).to(torch.float64 if dtype == torch.float64 else torch.float32),
        )
        return self.layout(self.edit(inputs, generator).map(lambda x: x.to(device)))


def cases(small: bool) -> list[Case]:
    """All cases; their names are unique."""
    return _cases_of_shapes(small) + _cases_of_contents(small)


def _cases_of_shapes(small: bool) -> list[Case]:
    n = 50 if small else 700
    block, dim = (32, 32) if small else (64, 64)
    # On a GPU groups whose forward shares blocks.
    few_heads = {"num_kv_heads": 1, "group_size": 1} if small else {"group_size": 4}
    found = []
    for group_size in (1, 2, 3, 4, 7, 8, 16):
        name = f"group_size_{group_size}"
        found.append(Case(name, (n,), num_kv_heads=1, group_size=group_size, head_dim=dim, block_size=block))
    for head_dim in (8, 40, 64, 80, 96, 128, 192, 256):
        found.append(Case(f"head_dim_{head_dim}", (n,), head_dim=head_dim, block_size=block, **few_heads))
    for block_size in (32, 64, 128, 256):
        lengths = (block_size + 20,) if small else (n, block_size + 20)
        found.append(
            Case(f"block_size_{block_size}", lengths, head_dim=dim, block_size=block_size, topk=3, **few_heads)
        )
    # The shape that models have, and the largest that kernels with tiles of 64 keys are made for.
    found.append(
        Case("model_shape", (150, 3), (150, 30), num_kv_heads=2, group_size=3, head_dim=128, topk=2, block_size=64)
    )
    for topk, length in ((1, n), (7, n), (16, n), (64, n if small else 2100)):
        found.append(Case(f"topk_{topk}", (length,), head_dim=dim, topk=topk, **few_heads))
    if not small:
        found.append(Case("topk_512", (n,), head_dim=dim, topk=512, select=repeated_blocks, num_kv_heads=1))
        found.append(Case("odd_everything", (900, 300), num_kv_heads=3, group_size=5, head_dim=72, block_size=128))
    return found


def _cases_of_contents(small: bool) -> list[Case]:
    n, long = (70, 110) if small else (700, 1500)  # tokens of an ordinary sequence, no multiples of the block
    block, dim = (32, 32) if small else (64, 64)

    def case(name: str, *lengths: tuple[int, ...], **options: Any) -> Case:
        shape = {"block_size": block, "head_dim": dim, "num_kv_heads": 1, "group_size": 2}
        if not small:
            shape |= {"num_kv_heads": 2, "group_size": 4}
        return Case(name, *lengths, **{**shape, **options})

    found = [
        case("basic", (n, 33, n // 2), num_kv_heads=2),
        case("no_block_selected", (n, 9), select=nothing),
        case("block_selected_by_all", (2 * n,), select=first_block_by_all, group_size=8, topk=2),
        case("block_selected_by_none", (n, 40), edit=_leave_out_block),
        *(case(f"ragged_tail_{t}", (2 * block + t, block + t)) for t in (-31, -1, 0, 1, 17)),
        case("tiny_sequences", (0, 1, 3, n, 0, 1, 3, 0)),
        case("single_token", (1,), topk=1),
        case("no_queries", (0, 0), (n, 3)),
        case("no_keys", (5, 2), (0, 0)),
        case("no_tokens", (0,)),
        case("more_keys", (1, 20, n - 20), (n, n + 1, n + 5)),
        case("fewer_keys", (n, 40, 9), (n - 50, 0, 8)),
        case("not_causal", (n, 1, 20), (n, 33, 5), causal=False),
        case("softmax_scale", (n,), softmax_scale=0.7),
        case("repeated_slots", (n, 20), select=repeated_blocks, topk=6),
        case("future_blocks", (n, 40), select=any_blocks),
        case("ids_out_of_range", (n, 40), edit=_put_ids_out_of_range, topk=8),
        case("tokens_outside_sequences", (5, n, 7), (40, n, 3), edit=_leave_out_outer_sequences),
        case("huge_logits", (n,), softmax_scale=1.0, edit=_make_logits_huge, dtypes=HALF),
        case("large_values", (n,), edit=_scale_values(2.0**100, 1.0), dtypes=(torch.bfloat16,)),
        case("small_values", (n,), edit=_scale_values(2.0**-90, 1.0), dtypes=(torch.bfloat16,)),
        case("large_values_fp16", (n,), edit=_scale_values(2.0**14, 2.0**-9), dtypes=HALF),
        case("values_of_many_sizes", (n,), edit=_scale_values_by_block, dtypes=HALF),
        case("nonfinite_unselected_block", (n, 40), edit=_make_unselected_block_nonfinite),
        case("nonfinite_next_sequence", (block + 7, n), edit=_make_last_sequence_nonfinite),
        *(case(f"nonfinite_masked_{x}", (long,), edit=_make_masked_nonfinite(x), topk=8) for x in ("k", "v", "kv")),
        *(case(f"nan_seen_by_some_{x}", (long,), edit=_make_some_see_nan(x)) for x in ("k", "v")),
        case("fused_qkv", (n - 20, 33), num_kv_heads=2, layout=_fuse_qkv),
        case("heads_outside", (n - 20, 33), num_kv_heads=2, layout=_lay_heads_outside),
        case("last_dimension_strided", (n - 20, 33), num_kv_heads=2, layout=_stride_last_dimension),
        case("misaligned", (n - 20, 33), num_kv_heads=2, layout=_misalign),
        case("expanded_gradients", (n - 20, 33), num_kv_heads=2, layout=_expand_gradients),
    ]
    if not small:
        found.append(case("many_sequences", tuple(i * 7 % 65 for i in range(100))))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Changes of values
# ---------------------------------------------------------------------------------------------------------------------
def _fill_nonfinite(rows: Tensor) -> None:
    """NaN, inf and -inf in turn, in place; rows [n, heads, head_dim]."""
    values = rows.new_tensor((math.nan, math.inf, -math.inf))
    rows.copy_(values[torch.arange(len(rows)) % 3][:, None, None].expand_as(rows))


def _leave_out_block(inputs: Inputs, generator: Generator) -> Inputs:
    return inputs.replace(topk_idx=inputs.topk_idx.masked_fill(inputs.topk_idx == 1, -1))


def _put_ids_out_of_range(inputs: Inputs, generator: Generator) -> Inputs:
    num_blocks = -(-int(inputs.cu_seqlens_k.diff().max()) // inputs.block_size)
    wrap = 2**32 // inputs.block_size  # times block_size: 0 in 32 bits
    ids = (num_blocks, num_blocks + 1, 10**6, wrap // 2, wrap // 2 + 1, wrap, wrap + 1, INT32_MAX, INT32_MAX - 1)
    ids = torch.tensor(
        (*ids, -2, -3, -wrap // 2, -wrap // 2 + 1, 1 - wrap, INT32_MIN, INT32_MIN + 1), dtype=torch.int64
    )
    ids = ids[(ids >= INT32_MIN) & (ids <= INT32_MAX)].int()
    shape = inputs.topk_idx.shape
    drawn = ids[torch.randint(len(ids), shape, generator=generator)]
    return inputs.replace(topk_idx=drawn.where(torch.rand(shape, generator=generator) < 0.6, inputs.topk_idx))


def _leave_out_outer_sequences(inputs: Inputs, generator: Generator) -> Inputs:
    """The first and the last sequence become tokens of no sequence, with keys that must not be read."""
    first, last = int(inputs.cu_seqlens_k[1]), int(inputs.cu_seqlens_k[-2])
    for x in (inputs.k, inputs.v):
        _fill_nonfinite(x[:first])
        _fill_nonfinite(x[last:])
    return inputs.replace(
        cu_seqlens_q=inputs.cu_seqlens_q[1:-1].clone(), cu_seqlens_k=inputs.cu_seqlens_k[1:-1].clone()
    )


def _make_logits_huge(inputs: Inputs, generator: Generator) -> Inputs:
    """Scores of +-10,000 that differ by about one within a sign, made of numbers whose products and sums are exact."""
    for x in (inputs.q, inputs.k):
        x.copy_(torch.randint(-4, 5, x.shape, generator=generator) / 8)
        x[..., 0] = torch.randint(2, x.shape[:-1], generator=generator) * 200 - 100
    return inputs


def _scale_values(values: float, gradients: float) -> Callable[[Inputs, Generator], Inputs]:
    def scale(inputs: Inputs, generator: Generator) -> Inputs:
        largest = torch.finfo(inputs.v.dtype).max * 0.9
        v = (inputs.v.double() * values).clamp(-largest, largest).to(inputs.v.dtype)
        return inputs.replace(v=v, dout=inputs.dout * gradients)

    return scale


def _scale_values_by_block(inputs: Inputs, generator: Generator) -> Inputs:
    block = torch.arange(len(inputs.v)) // inputs.block_size
    return inputs.replace(v=inputs.v * (2.0 ** (6 - 5 * (block % 4))).to(inputs.v.dtype)[:, None, None])


def _make_unselected_block_nonfinite(inputs: Inputs, generator: Generator) -> Inputs:
    for begin in inputs.cu_seqlens_k[:-1].tolist():
        for x in (inputs.k, inputs.v):
            _fill_nonfinite(x[begin + inputs.block_size : begin + 2 * inputs.block_size])
    return _leave_out_block(inputs, generator)


def _make_last_sequence_nonfinite(inputs: Inputs, generator: Generator) -> Inputs:
    """The rows behind a ragged tail; their own queries select nothing."""
    begin_q, begin_k = int(inputs.cu_seqlens_q[-2]), int(inputs.cu_seqlens_k[-2])
    for x in (inputs.k, inputs.v):
        _fill_nonfinite(x[begin_k:])
    inputs.topk_idx[:, begin_q:] = -1
    return inputs


def _make_masked_nonfinite(names: str) -> Callable[[Inputs, Generator], Inputs]:
    """The second half of every other block, which nobody who selects it sees yet: later queries leave the block out."""

    def edit(inputs: Inputs, generator: Generator) -> Inputs:
        half = inputs.block_size // 2
        query = torch.arange(len(inputs.q))
        for begin in range(half, len(inputs.k), 2 * inputs.block_size):
            later = (query >= begin)[:, None] & (inputs.topk_idx == begin // inputs.block_size)
            inputs.topk_idx[later] = -1
            for name in names:
                _fill_nonfinite(getattr(inputs, name)[begin : begin + half])
        return inputs

    return edit


def _make_some_see_nan(name: str) -> Callable[[Inputs, Generator], Inputs]:
    """One number of a key in the middle of a block: earlier queries that select the block are as if it were none."""

    def edit(inputs: Inputs, generator: Generator) -> Inputs:
        getattr(inputs, name)[inputs.block_size * 3 // 2, 0, 3] = math.nan
        return inputs

    return edit


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------
def _fuse_qkv(inputs: Inputs) -> Inputs:
    """q, k and v are slices of one projection's result; topk_idx and the gradients lie as other code likes them."""
    heads = (inputs.q.shape[1], inputs.num_kv_heads, inputs.num_kv_heads)
    q, k, v = torch.cat([inputs.q, inputs.k, inputs.v], 1).split(heads, 1)
    return inputs.replace(q=q, k=k, v=v, topk_idx=inputs.topk_idx.permute(1, 2, 0).contiguous().permute(2, 0, 1))


def _lay_heads_outside(inputs: Inputs) -> Inputs:
    """Tensors of [num_heads, tokens, head_dim], transposed."""

    def outside(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    q, k, v, dout = (outside(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    return inputs.replace(q=q, k=k, v=v, dout=dout, dlse=outside(inputs.dlse))


def _stride_last_dimension(inputs: Inputs) -> Inputs:
    def strided(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    return inputs.replace(**{name: strided(getattr(inputs, name)) for name in ("q", "k", "v", "dout", "dlse")})


def _misalign(inputs: Inputs) -> Inputs:
    """Rows that begin 2 or 4 bytes past a multiple of 16."""

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    return inputs.replace(**{name: shifted(getattr(inputs, name)) for name in ("q", "k", "v", "dout")})


def _expand_gradients(inputs: Inputs) -> Inputs:
    """Strides of 0, as `(out.sum() + lse.sum()).backward()` gives."""
    one = inputs.dout.new_ones(())
    return inputs.replace(dout=one.expand_as(inputs.dout), dlse=one.to(inputs.dlse.dtype).expand_as(inputs.dlse))
