"""Compression of keys and values: windows of kernel_size tokens, one every kernel_stride, become one row each.

Native Sparse Attention (arXiv 2502.11089), equation 7. A window lies inside one sequence; a sequence of n tokens has
(n - kernel_size) // kernel_stride + 1 windows, or none if it is shorter than a window.

Windows overlap, so they are never written out. Tokens are gathered once, in chunks of kernel_stride; a window is
kernel_size / kernel_stride chunks in a row, and what each chunk contributes to each place in a window is added up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..checks import check_cu_seqlens
from ..registration import Definition, register
from . import checks
from .packed import packed_rows, prefix_sums


class Windows(NamedTuple):
    """Where the windows of packed sequences lie. n = total // kernel_stride bounds chunks and windows without a look at
    cu_seqlens; rows beyond the last chunk or window are padding, in which any index that is in bounds may stand."""

    cu_seqlens: Tensor  # [batch + 1], int32: windows of each sequence, prefix sums
    positions: Tensor  # [total + n], int64: `token_position`, then `position`
    terms: Tensor  # [places, n], int64: chunk * places + place, of the chunk that a window has at each of its places
    chunk_tokens: Tensor  # [n * kernel_stride], int64: the tokens of every chunk
    token_places: Tensor  # [total], int64: where a token stands in chunk_tokens; if in no chunk, any
    in_chunk: Tensor  # [total], bool: whether a token is in a chunk

    @property
    def token_position(self) -> Tensor:
        """[total], int64: where a token stands in its sequence; -1 in none."""
        return self.positions[: len(self.token_places)]

    @property
    def position(self) -> Tensor:
        """[n], int64: where a window's first token stands in its sequence; 0 in padding."""
        return self.positions[len(self.token_places) :]


def find_windows(
    cu_seqlens: Tensor, total: int, kernel_size: int, kernel_stride: int, *, backend: str = "auto"
) -> Windows:
    """The windows of packed sequences.

    Args:
        cu_seqlens: [batch + 1], int32, where sequences begin, and the total; is not read on the host.
        total: tokens of all sequences.
        kernel_size, kernel_stride: tokens a window, and from one window to the next; whole strides.
        backend: as in `compressed_attention`; all give the same numbers.
    """
    checks.check_choice("backend", backend, checks.BACKENDS)
    op = getattr(torch.ops.fsa, _OP_NAMES[backend]).default
    return Windows(*op(cu_seqlens, total, kernel_size, kernel_stride))


def linear_compression(
    x: Tensor, weight: Tensor, windows: Windows, kernel_stride: int, intra_block_pe: Tensor | None = None
) -> Tensor:
    """Each window as a learned linear map of its tokens.

    Args:
        x: [total, num_kv_heads, head_dim], keys before RoPE, or values.
        weight: [num_kv_heads, kernel_size * head_dim, head_dim]; row t * head_dim + d belongs to dimension d of the
            window's token t.
        windows: of x.
        kernel_stride: tokens from one window's start to the next one's.
        intra_block_pe: [num_kv_heads, kernel_size, head_dim], added to the tokens of every window, or None.

    Returns:
        [total // kernel_stride, num_kv_heads, head_dim], dtype of x; unspecified rows beyond windows.cu_seqlens[-1].
    """
    num_kv_heads, _, head_dim = weight.shape
    chunks = _chunks(x, windows, kernel_stride).flatten(2)  # [heads, n, stride * dim]
    # A window's chunk number `place` goes through its own rows of the weight: one product makes them all.
    taps = weight.unflatten(1, (-1, kernel_stride * head_dim)).transpose(1, 2)  # [heads, stride * dim, places, dim]
    products = (chunks @ taps.flatten(2)).unflatten(2, (-1, head_dim)).flatten(1, 2)  # [heads, n * places, dim]
    compressed = _add_up(products, windows.terms)
    if intra_block_pe is not None:
        compressed = compressed + intra_block_pe.reshape(num_kv_heads, 1, -1) @ weight
    return compressed.transpose(0, 1).to(x.dtype)


def mean_pooling(x: Tensor, windows: Windows, kernel_size: int, kernel_stride: int) -> Tensor:
    """Each window as the mean of its tokens; arguments and result as in `linear_compression`."""
    chunks = _chunks(x, windows, kernel_stride)
    sums = chunks.sum(2, dtype=torch.promote_types(x.dtype, torch.float32)) / kernel_size  # [heads, n, dim]
    # A chunk gives the same to every place.
    compressed = _add_up(sums, windows.terms // len(windows.terms))
    return compressed.transpose(0, 1).to(x.dtype)


def _add_up(contributions: Tensor, terms: Tensor) -> Tensor:
    """Contributions [heads, rows, dim] -> windows [heads, n, dim], in fp32 or float64.

    A window is the sum of the rows that stand in its column of `terms`, [places, n].
    """
    compute = torch.promote_types(contributions.dtype, torch.float32)
    return contributions.index_select(1, terms.flatten()).unflatten(1, terms.shape).sum(1, dtype=compute)


def _chunks(x: Tensor, windows: Windows, kernel_stride: int) -> Tensor:
    """[total, heads, dim] -> [heads, n, kernel_stride, dim]: the tokens of all chunks, by head."""
    tokens: Tensor = _GatherChunks.apply(x, windows.chunk_tokens, windows.token_places, windows.in_chunk)
    return tokens.unflatten(1, (-1, kernel_stride))


class _GatherChunks(torch.autograd.Function):
    """[total, heads, dim] -> [heads, n * kernel_stride, dim]: the tokens of all chunks, by head.

    A token is in one chunk at most, so the gradient is gathered too; that of index_select would be added by atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk_tokens: Tensor, token_places: Tensor, in_chunk: Tensor) -> Tensor:
        ctx.save_for_backward(token_places, in_chunk)
        return x.transpose(0, 1).index_select(1, chunk_tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        token_places, in_chunk = ctx.saved_tensors
        if gradient.shape[1] == 0:
            return gradient.new_zeros((len(token_places), gradient.shape[0], gradient.shape[2])), None, None, None
        tokens = gradient.transpose(0, 1).index_select(0, token_places)
        return torch.where(in_chunk[:, None, None], tokens, 0), None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The operators behind `find_windows`, and their twin
# ---------------------------------------------------------------------------------------------------------------------
_SCHEMA = (
    "(Tensor cu_seqlens, SymInt total, int kernel_size, int kernel_stride) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_OP_NAMES = {"auto": "find_windows", "triton": "_find_windows_triton", "reference": "_find_windows_reference"}


def _forward(family: str, cu_seqlens: Tensor, total: int, kernel_size: int, kernel_stride: int) -> tuple[Tensor, ...]:
    _check(cu_seqlens, kernel_size, kernel_stride)
    if family == "auto":
        # Kernels of integers run wherever those of fp16 do; where they cannot, compressed attention says why.
        backend, _ = backends.preferred(cu_seqlens.device, torch.float16, ("triton",))
    else:
        backend = checks.choose_backend(family, cu_seqlens, "the search for windows")
    if backend == "reference":
        return _reference(cu_seqlens, total, kernel_size, kernel_stride)
    from . import triton_find_windows  # needs triton

    return triton_find_windows.find_windows(cu_seqlens, total, kernel_size, kernel_stride)


def _check(cu_seqlens: Tensor, kernel_size: int, kernel_stride: int) -> None:
    checks.check_windows(kernel_size, kernel_stride)
    check_cu_seqlens(cu_seqlens, cu_seqlens, ("cu_seqlens", "cu_seqlens"))


def _reference(cu_seqlens: Tensor, total: int, kernel_size: int, kernel_stride: int) -> Windows:
    n, places = total // kernel_stride, kernel_size // kernel_stride
    bounds = cu_seqlens.long().clamp(0, total)
    chunks = bounds.diff().clamp(min=0) // kernel_stride
    windows = (chunks - (places - 1)).clamp(min=0)
    chunk_bounds, window_bounds = (prefix_sums(lengths).clamp(max=n) for lengths in (chunks, windows))
    chunk, window, token = packed_rows(chunk_bounds, n), packed_rows(window_bounds, n), packed_rows(cu_seqlens, total)
    chunk_begin = (bounds[chunk.sequence] + chunk.position * kernel_stride).clamp(0, max(total - kernel_stride, 0))
    first_chunk = chunk_bounds[window.sequence] + window.position
    token_places = chunk_bounds[token.sequence] * kernel_stride + token.position
    place, offset = (torch.arange(count, device=cu_seqlens.device)[:, None] for count in (places, kernel_stride))
    return Windows(
        cu_seqlens=window_bounds.int(),
        positions=torch.cat((token.position, window.position.clamp(min=0) * kernel_stride)),
        terms=(first_chunk + place).clamp(0, max(n - 1, 0)) * places + place,
        chunk_tokens=(chunk_begin[:, None] + offset.T).flatten(),
        token_places=token_places.clamp(0, max(n * kernel_stride - 1, 0)),
        in_chunk=(token.position >= 0) & (token.position // kernel_stride < chunks[token.sequence]),
    )


def _fake(family: str, cu_seqlens: Tensor, total: int, kernel_size: int, kernel_stride: int) -> tuple[Tensor, ...]:
    _check(cu_seqlens, kernel_size, kernel_stride)
    n = total // kernel_stride
    shapes = ((total + n,), (kernel_size // kernel_stride, n), (n * kernel_stride,), (total,))
    rows = (cu_seqlens.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return torch.empty_like(cu_seqlens), *rows, cu_seqlens.new_empty((total,), dtype=torch.bool)


for _family, _op_name in _OP_NAMES.items():
    register(_family, _op_name, Definition(_SCHEMA, _forward, _fake))
