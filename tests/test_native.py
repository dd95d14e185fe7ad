"""What csrc/ computes without a GPU: layouts, sequences, dispatch; through a pybind11 module that is built here."""

from __future__ import annotations

from types import ModuleType

import pytest
from compiled import native_functions
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa import tiling

HEAD_DIMS = (64, 96, 128, 192, 256)  # of the kernels
INT32 = st.integers(-(2**31), 2**31 - 1)


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return native_functions()


# Layouts


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_swizzle_keeps_every_chunk_in_a_place_of_its_own_in_its_row(native: ModuleType, head_dim: int) -> None:
    offset, row_bytes = native.tile_offset[head_dim], head_dim * 2
    for row in range(128):
        places = sorted(offset(row, chunk) for chunk in range(head_dim // 8))
        assert places == [row * row_bytes + 16 * i for i in range(head_dim // 8)]


def _banks(offsets: list[int]) -> set[int]:
    return {offset // 16 % 8 for offset in offsets}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_swizzle_has_no_bank_conflicts(native: ModuleType, head_dim: int) -> None:
    offset = native.tile_offset[head_dim]
    for row in range(0, 64, 8):
        for chunk in range(head_dim // 8):
            assert len(_banks([offset(row + i, chunk) for i in range(8)])) == 8, "ldmatrix: eight rows, one chunk"
    for row in range(0, 64, 2):
        for chunk in range(0, head_dim // 8, 4):
            quarter_warp = [offset(row + i, chunk + j) for i in range(2) for j in range(4)]
            assert len(_banks(quarter_warp)) == 8, "16-byte loads: two rows, four chunks"
    num_chunks = head_dim // 8
    for first in range(0, 16 * num_chunks, 8):
        quarter_warp = [offset((first + i) // num_chunks, (first + i) % num_chunks) for i in range(8)]
        assert len(_banks(quarter_warp)) == 8, "16-byte loads: eight chunks as they follow one another, row after row"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_swizzle_repeats_every_8_rows_and_8_chunks(native: ModuleType, head_dim: int) -> None:
    offset, num_chunks = native.tile_offset[head_dim], head_dim // 8
    for row in range(32):
        for chunk in range(num_chunks):
            assert offset(row + 8, chunk) == offset(row, chunk) + 8 * head_dim * 2
            # A row of 4 chunks past the last whole group of 8 stays inside it, since its pattern is below 4.
            if chunk + 8 < num_chunks:
                assert offset(row, chunk + 8) == offset(row, chunk) + 128


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_swizzle_keeps_sectors_together(native: ModuleType, head_dim: int) -> None:
    offset = native.tile_offset[head_dim]
    for row in range(16):
        for chunk in range(0, head_dim // 8, 2):
            assert offset(row, chunk) // 32 == offset(row, chunk + 1) // 32, "copies of a sector ask L2 once"


def _walk_descriptor(descriptor: int, along_sum: bool, outer: int, k: int) -> int:
    """Byte address of an element of wgmma's operand, as the PTX ISA has it ("Matrix descriptor", "Strides").

    An operand is `outer` (rows of A, columns of B) by 16 elements of the sum. The swizzle works on patterns of 8 rows
    of 128 or 64 bytes, which lie along the sum or along `outer`.
    """

    def field(low: int, high: int) -> int:
        return descriptor >> low & (1 << (high - low + 1)) - 1

    start, leading, stride = field(0, 13) << 4, field(16, 29) << 4, field(32, 45) << 4
    assert field(49, 51) == 0, "the base offset of patterns that are not aligned"
    row_bytes = {1: 128, 2: 64}[field(62, 63)]
    if along_sum:
        # A row of the pattern is one `outer`; `stride` leads to the next 8.
        address = start + outer // 8 * stride + outer % 8 * row_bytes + k * 2
    else:
        # A row of the pattern is one k; `stride` leads to the next 8, `leading` to the next row_bytes of `outer`.
        panel, within = divmod(outer, row_bytes // 2)
        address = start + panel * leading + k // 8 * stride + k % 8 * row_bytes + within * 2
    # Address bits 4 .. 6 (4, 5) are exchanged by bits 7 .. 9 (7, 8).
    return address ^ (address >> 7 & row_bytes // 16 - 1) << 4


def test_wgmma_tile_keeps_every_chunk_in_a_place_of_its_own(native: ModuleType) -> None:
    for tile in native.wgmma_tiles:
        chunks = [(row, chunk) for row in range(tile.rows) for chunk in range(tile.columns // 8)]
        assert sorted(tile.offset(*chunk) for chunk in chunks) == list(range(0, tile.bytes, 16))


def test_wgmma_tile_has_no_bank_conflicts(native: ModuleType) -> None:
    for tile in native.wgmma_tiles:
        for row in range(0, tile.rows, 8):
            for chunk in range(tile.columns // 8):
                assert len(_banks([tile.offset(row + i, chunk) for i in range(8)])) == 8


def test_wgmma_descriptors_lead_to_the_elements_of_the_tile(native: ModuleType) -> None:
    for tile in native.wgmma_tiles:
        for base in (0, 163 * 1024):  # to the end of what a CTA can have

            def place(row: int, column: int, tile=tile, base=base) -> int:
                return base + tile.offset(row, column // 8) + column % 8 * 2

            for step in range(tile.columns // 16):
                for first in {0, 8, tile.rows // 2}:
                    descriptor = tile.along_columns(base, step, first)
                    for outer in range(tile.rows - first):
                        for k in range(16):
                            at = _walk_descriptor(descriptor, True, outer, k)
                            assert at == place(first + outer, 16 * step + k)
            for step in range(tile.rows // 16):
                for panel in range(tile.columns // tile.panel_columns):
                    first, descriptor = panel * tile.panel_columns, tile.along_rows(base, step, panel)
                    for outer in range(tile.columns - first):
                        for k in range(16):
                            at = _walk_descriptor(descriptor, False, outer, k)
                            assert at == place(16 * step + k, first + outer)


def test_interleave_gives_a_lane_neighbouring_columns(native: ModuleType) -> None:
    place = {}  # (chunk, word) in shared memory -> the word's number among the columns
    for chunk in range(8):
        for word in range(4):
            to_chunk, to_word = native.interleave(chunk, word)
            assert native.interleave(to_chunk, to_word) == (chunk, word)
            place[to_chunk, to_word] = 4 * chunk + word
    assert sorted(place.values()) == list(range(32))
    for group in range(2):
        for lane in range(4):  # of a quad: accumulator words of the n8 tiles w = 0..3 at word `lane` of chunk w
            words = [place[4 * group + w, lane] for w in range(4)]
            assert words == [4 * (4 * group + lane) + w for w in range(4)]


@given(n=st.integers(0, 2**31 - 1), divisor=st.integers(1, 2**31 - 1))
def test_fast_divide_is_division(native: ModuleType, n: int, divisor: int) -> None:
    for m in (n, n - n % divisor, max(0, n - n % divisor - 1), 2**31 - 1):
        assert native.quotient(m, divisor) == m // divisor


# Sequences

lengths = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 200)), min_size=1, max_size=8)


def _prefix_sums(values: list[int]) -> list[int]:
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


@given(lengths=lengths, block_size=st.sampled_from([32, 64, 128, 256]), causal=st.booleans())
@settings(deadline=None)
def test_sequences_follow_the_definition(
    native: ModuleType, lengths: list[tuple[int, int]], block_size: int, causal: bool
) -> None:
    cu_q, cu_k = _prefix_sums([q for q, _ in lengths]), _prefix_sums([k for _, k in lengths])
    sequences = native.Sequences(cu_q, cu_k, cu_q[-1], cu_k[-1])
    num_blocks = cu_k[-1] // block_size + len(lengths)
    for b, (len_q, len_k) in enumerate(lengths):
        assert sequences.bounds(b) == (cu_q[b], len_q, cu_k[b], len_k)
        first = sequences.first_block(b, block_size)
        for block in range(first, first + tiling.ceil_div(len_k, block_size)):
            assert block < num_blocks
            assert sequences.of_block(block, block_size) == b
        for position in range(len_q):
            query = cu_q[b] + position
            assert sequences.of_query(query) == b
            visible = [j for j in range(len_k) if not causal or j <= position + len_k - len_q]
            assert max(sequences.last_visible_key(b, query, causal), -1) == (visible[-1] if visible else -1)
        for query in (cu_q[b] - 1, cu_q[b + 1]):
            assert sequences.last_visible_key(b, query, causal) == -1, "a token of another sequence"


@given(
    cu_q=st.lists(INT32, min_size=2, max_size=6),
    cu_k=st.lists(INT32, min_size=6, max_size=6),
    total_q=st.integers(0, 100),
    total_k=st.integers(0, 100),
)
@settings(deadline=None)
def test_hostile_cu_seqlens_stay_inside_the_tensors(
    native: ModuleType, cu_q: list[int], cu_k: list[int], total_q: int, total_k: int
) -> None:
    batch = len(cu_q) - 1
    sequences = native.Sequences(cu_q, cu_k[: batch + 1], total_q, total_k)
    for b in range(batch):
        query_begin, num_queries, key_begin, num_keys = sequences.bounds(b)
        assert 0 <= query_begin <= query_begin + num_queries <= total_q
        assert 0 <= key_begin <= key_begin + num_keys <= total_k
        assert 0 <= sequences.first_block(b, 32) < total_k // 32 + batch
    for query in range(total_q):
        assert 0 <= sequences.of_query(query) < batch


@given(block_id=INT32, block_size=st.sampled_from([32, 64, 128, 256]), last_key=st.integers(-1, 2**31 - 1))
def test_a_slot_attends_iff_its_first_key_is_visible(
    native: ModuleType, block_id: int, block_size: int, last_key: int
) -> None:
    for key_offset in range(0, block_size, 32):
        expected = block_id >= 0 and block_id * block_size + key_offset <= last_key
        assert native.slot_attends(block_id, block_size, key_offset, last_key) == expected
    expected = native.slot_attends(block_id, block_size, 0, last_key)
    assert (0 <= block_id < native.visible_blocks(block_size, last_key)) == expected


# Dispatch


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_dispatch_takes_the_smallest_kernel_that_holds_head_dim(native: ModuleType, head_dim: int) -> None:
    assert native.kernel_head_dim(head_dim) == min(width for width in HEAD_DIMS if width >= head_dim)
    for block_size in (32, 64, 128, 256):
        tile_k = tiling.forward_tile_k(head_dim, block_size)
        assert native.kernel_forward_tile_k(head_dim, tile_k) == tile_k
        tile_k = tiling.backward_tile_k(head_dim, block_size)
        assert native.kernel_backward_tile_k(head_dim, tile_k) == tile_k


def test_dispatch_throws_where_no_kernel_is_built(native: ModuleType) -> None:
    for head_dim in (-8, 0, 264):
        with pytest.raises(RuntimeError, match=f"no kernel is built for head_dim = {head_dim}"):
            native.kernel_head_dim(head_dim)
    for head_dim, tile_k in ((128, 16), (128, 256), (192, 128)):
        with pytest.raises(RuntimeError, match=f"no kernel is built for forward tile_k = {tile_k}"):
            native.kernel_forward_tile_k(head_dim, tile_k)
    for head_dim, tile_k in ((128, 128), (256, 64)):
        with pytest.raises(RuntimeError, match=f"no kernel is built for backward tile_k = {tile_k}"):
            native.kernel_backward_tile_k(head_dim, tile_k)
