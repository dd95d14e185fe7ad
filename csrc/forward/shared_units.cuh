// What the forward shared kernel works on: units, which are rows of query tiles, and the sub-blocks that these share.
#pragma once

#include "device/sequence.cuh"
#include "device/work_item.cuh"
#include "params.h"

namespace fsa {
namespace forward_shared {

// kRows rows of a query tile, or of two where a tile has but 64.
struct Unit {
    int head, kv_head;  // counted from the chunk's first; of the tensors
    int first_tile;     // counted from the head's first
    int num_tiles;
    int first_row;  // counted from the first tile's first; row r is head r % group_size of query r / group_size
};

// Units are numbered by tile, then KV head: the first tiles, which see few blocks and share all, are spread over the CTAs.
template <typename Traits>
struct Units {
    int tiles_a_unit, units_a_tile;

    __device__ __forceinline__ explicit Units(const Geometry& g) {
        const int rows_a_tile = kQueryTile * g.group_size;
        tiles_a_unit = max(Traits::kRows / rows_a_tile, 1);
        units_a_tile = (rows_a_tile - 1) / Traits::kRows + 1;
    }

    __device__ __forceinline__ int count(const ForwardSharedParams& p) const {
        return ((p.shared.num_tiles - 1) / tiles_a_unit + 1) * p.geometry.num_heads * units_a_tile;
    }

    __device__ __forceinline__ Unit unit(const ForwardSharedParams& p, int index) const {
        const int tile_and_head = index / units_a_tile, tile = tile_and_head / p.geometry.num_heads;
        Unit u;
        u.head = tile_and_head - tile * p.geometry.num_heads;
        u.kv_head = p.geometry.head_begin + u.head;
        u.first_tile = tile * tiles_a_unit;
        u.num_tiles = min(tiles_a_unit, p.shared.num_tiles - u.first_tile);
        u.first_row = (index - tile_and_head * units_a_tile) * Traits::kRows;
        return u;
    }
};

// Some queries of the unit's tile `tile`, a bit each.
struct TileQueries {
    int tile;
    uint32_t bits[2];

    __device__ __forceinline__ bool overlaps(const TileQueries& other) const {
        return tile == other.tile && ((bits[0] & other.bits[0]) | (bits[1] & other.bits[1])) != 0;
    }
};

// Those of the unit's rows from `first` on, `count` of them; of one tile.
__device__ __forceinline__ TileQueries queries_of_rows(const Geometry& g, const Unit& unit, int first, int count) {
    const int first_query = g.by_group_size.quotient(unit.first_row + first);
    const int last_query = g.by_group_size.quotient(unit.first_row + first + count - 1);
    const int tile = first_query / kQueryTile, begin = first_query % kQueryTile;
    const int last = min(last_query - tile * kQueryTile, kQueryTile - 1);
    const uint64_t queries = ~uint64_t{0} >> (kQueryTile - 1 - (last - begin)) << begin;
    return {tile, {static_cast<uint32_t>(queries), static_cast<uint32_t>(queries >> 32)}};
}

// A row of a unit; rows behind the last query repeat it. No key is visible yet, and no place known.
struct UnitRow : QueryRow {
    int tile, query_in_tile;
    int query_in_chunk;
    bool exists;
};

__device__ __forceinline__ UnitRow make_unit_row(const Geometry& g, const Unit& unit, int row) {
    const int tile_row = unit.first_row + row, query_in_unit = g.by_group_size.quotient(tile_row);
    const int query = unit.first_tile * kQueryTile + query_in_unit;
    UnitRow r;
    r.tile = query_in_unit / kQueryTile;
    r.query_in_tile = query_in_unit % kQueryTile;
    r.exists = r.tile < unit.num_tiles && query < g.num_queries;
    r.query_in_chunk = min(query, g.num_queries - 1);
    r.query = g.query_begin + r.query_in_chunk;
    r.group_head = tile_row - query_in_unit * g.group_size;
    r.partial_row = r.last_visible = -1;
    return r;
}

// A sub-block of kTileK keys of a shared block.
struct SharedSubBlock {
    TileQueries queries;  // that share it
    int key_token;        // first key, as a row of k and v
    int num_keys;         // inside the sequence; 0 where there are none
    int visible_offset;   // VisibleKeys, counted from the first key
    int visible_end;
};

// Sub-block `sub` of an entry of a tile's list.
template <typename Traits>
__device__ __forceinline__ SharedSubBlock make_sub_block(const Geometry& g, int tile, const int4& entry, int sub) {
    const SequenceBounds bounds = sequence_bounds(g.sequences, entry.y);
    const int first_key =
        (entry.x - first_block(g.sequences, entry.y, g.block_size)) * g.block_size + sub * Traits::kTileK;
    const VisibleKeys visible = visible_keys(bounds, g.causal);
    SharedSubBlock b;
    b.queries = {tile, {static_cast<uint32_t>(entry.z), static_cast<uint32_t>(entry.w)}};
    b.num_keys = max(min(bounds.num_keys - first_key, Traits::kTileK), 0);
    b.key_token = bounds.key_begin + first_key;
    b.visible_offset = visible.offset - first_key;
    b.visible_end = visible.end - first_key;
    return b;
}

// The row with the last key of the sub-block that it sees; none if its query does not share the block.
__device__ __forceinline__ QueryRow row_in_block(const UnitRow& unit_row, const SharedSubBlock& block) {
    QueryRow row = unit_row;
    const uint32_t bits = unit_row.query_in_tile < 32 ? block.queries.bits[0] : block.queries.bits[1];
    const bool shares = unit_row.tile == block.queries.tile && (bits >> unit_row.query_in_tile % 32 & 1);
    row.last_visible = shares ? min(row.query + block.visible_offset, block.visible_end) : -1;
    return row;
}

}  // namespace forward_shared
}  // namespace fsa
