"""Sizes of tiles and work items: pure functions of the shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsa import tiling


@given(st.integers(1, 1 << 32), st.integers(1, 64), st.integers(1, 200), st.integers(2, 1 << 16))
def test_backward_items(num_edges: int, num_heads: int, num_sms: int, max_pieces: int) -> None:
    free = tiling.backward_edges_per_item(num_edges, num_heads, num_sms)
    bounded = tiling.backward_edges_per_item(num_edges, num_heads, num_sms, max_pieces)
    assert free % 64 == bounded % 64 == 0 and 64 <= free <= bounded
    assert num_edges // free <= (4 if num_heads == 1 else 8) * num_sms
    assert 2 * num_edges // bounded + 1 <= max_pieces


@given(st.integers(1, 1024), st.integers(1, 1 << 22), st.integers(1, 100))
def test_plan_parts(num_heads: int, num_queries: int, num_ranges: int) -> None:
    parts = tiling.plan_parts(num_heads, num_queries, num_ranges)
    most = tiling.ceil_div(num_queries, 64 * num_ranges)
    assert 1 <= parts <= most
    ctas = num_heads * num_ranges
    assert parts == 1 or parts * ctas <= 264
    assert parts == most or (parts + 1) * ctas > 264


def test_query_ranges_keep_the_rows_of_a_range_in_l2() -> None:
    def ranges(num_queries: int, group_size: int) -> int:
        per_item = tiling.max_forward_edges_per_item(group_size, 64)
        return tiling.forward_query_ranges(num_queries, 2 * 128 * group_size, 16, num_queries // 64 + 1, per_item)

    assert [ranges(65536, group_size) for group_size in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert [ranges(num_queries, 4) for num_queries in (1, 16384, 16385, 65537)] == [1, 1, 2, 5]
    assert ranges(131072, 4) == 7  # eight would leave cells less than half an item


@pytest.mark.parametrize(("tile_k", "rows"), [(32, 512), (64, 1024), (128, 2048)])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8, 16, 64, 128])
def test_forward_items(group_size: int, tile_k: int, rows: int) -> None:
    largest = tiling.max_forward_edges_per_item(group_size, tile_k)
    assert largest % 64 == 0 and rows <= largest * group_size < rows + 64 * group_size
    smallest = tiling.forward_edges_per_item(largest, 1, 132)
    assert smallest % 64 == 0 and largest <= 4 * smallest < largest + 256
    assert tiling.forward_edges_per_item(largest, 1 << 24, 132) == largest
    assert tiling.forward_edges_per_item(1024, 1 << 20, 132) == 512


def test_tiles() -> None:
    assert [tiling.forward_tile_k(128, block_size) for block_size in (32, 64, 128, 256)] == [32, 64, 128, 128]
    assert [tiling.forward_tile_k(136, block_size) for block_size in (32, 64, 128, 256)] == [32, 64, 64, 64]
    assert [tiling.backward_tile_k(192, block_size) for block_size in (32, 64, 128, 256)] == [32, 64, 64, 64]
    assert [tiling.backward_tile_k(200, block_size) for block_size in (32, 64, 128, 256)] == [32, 32, 32, 32]
