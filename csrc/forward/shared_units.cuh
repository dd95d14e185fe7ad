// What the forward shared kernel works on: units, which are rows of query tiles, and the sub-blocks that these share.
#pragma once

#include "device/sequence.cuh"
#include "device/work_item.cuh"
#include "params.h"

namespace fsa {
namespace forward_shared {

// kRows rows of a query tile.
struct Unit {
    int head, kv_head;  // counted from the chunk's first; of the tensors
    int tile;           // counted from the head's first
    int first_row;      // counted from the tile's first; row r is head r % group_size of query r / group_size
};

template <typename Traits>
__device__ __forceinline__ int units_a_tile(const Geometry& g) {
    static_assert(kQueryTile * kSharedHeads % Traits::kRows == 0, "a tile is whole units");
    return kQueryTile * g.group_size / Traits::kRows;
}

// Units are numbered by tile, then KV head: the first tiles, which see few blocks and share all, are spread over the CTAs.
template <typename Traits>
__device__ __forceinline__ Unit make_unit(const Geometry& g, int index) {
    const int per_tile = units_a_tile<Traits>(g), tile_and_head = index / per_tile;
    Unit u;
    u.tile = tile_and_head / g.num_heads;
    u.head = tile_and_head - u.tile * g.num_heads;
    u.kv_head = g.head_begin + u.head;
    u.first_row = (index - tile_and_head * per_tile) * Traits::kRows;
    return u;
}

// Some queries of a tile, a bit each.
struct TileQueries {
    uint32_t bits[2];

    __device__ __forceinline__ bool overlap(const TileQueries& other) const {
        return ((bits[0] & other.bits[0]) | (bits[1] & other.bits[1])) != 0;
    }
};

template <typename Traits>
__device__ __forceinline__ TileQueries queries_of_unit(const Geometry& g, const Unit& unit) {
    const int first_query = g.by_group_size.quotient(unit.first_row),
              last_query = g.by_group_size.quotient(unit.first_row + Traits::kRows - 1);
    const uint64_t queries = ~uint64_t{0} >> (kQueryTile - 1 - (last_query - first_query)) << first_query;
    return {{static_cast<uint32_t>(queries), static_cast<uint32_t>(queries >> 32)}};
}

// A row of a unit. Rows behind the chunk's last query are rows of that one, and do not exist. No key is visible yet.
struct UnitRow : QueryRow {  // partial_row: the row's first partial; the next is group_size rows behind it
    int query_in_tile;
    int query_in_chunk;

    __device__ __forceinline__ bool exists() const {
        return partial_row >= 0;
    }
};

__device__ __forceinline__ UnitRow make_unit_row(const Geometry& g, const Unit& unit, int row) {
    const int tile_row = unit.first_row + row;
    UnitRow r;
    r.query_in_tile = g.by_group_size.quotient(tile_row);
    const int query = unit.tile * kQueryTile + r.query_in_tile;
    r.query_in_chunk = min(query, g.num_queries - 1);
    r.query = g.query_begin + r.query_in_chunk;
    r.group_head = tile_row - r.query_in_tile * g.group_size;
    r.partial_row = query < g.num_queries ? query * g.topk * g.subs * g.group_size + r.group_head : -1;
    r.last_visible = -1;
    return r;
}

// A sub-block of kSubBlockKeys keys of a shared block.
struct SharedSubBlock {
    TileQueries queries;  // that share it
    int key_token;        // first key, as a row of k and v
    int visible_offset;   // VisibleKeys, counted from the first key
    int visible_end;

    static __device__ __forceinline__ SharedSubBlock none() {
        return {{{0, 0}}, 0, 0, -1};
    }
    // Inside the sequence; 0 where there are none.
    __device__ __forceinline__ int num_keys() const {
        return max(min(visible_end + 1, kSharedKeys), 0);
    }
};

// Sub-block `sub` of an entry of a tile's list.
template <typename Traits>
__device__ __forceinline__ SharedSubBlock make_sub_block(const Geometry& g, const int4& entry, int sub) {
    const SequenceBounds bounds = sequence_bounds(g.sequences, entry.y);
    const int first_key =
        (entry.x - first_block(g.sequences, entry.y, g.block_size)) * g.block_size + sub * Traits::kSubBlockKeys;
    const VisibleKeys visible = visible_keys(bounds, g.causal);
    SharedSubBlock b;
    b.queries = {{static_cast<uint32_t>(entry.z), static_cast<uint32_t>(entry.w)}};
    b.key_token = bounds.key_begin + first_key;
    b.visible_offset = visible.offset - first_key;
    b.visible_end = visible.end - first_key;
    return b;
}

// The last key of the sub-block that the row sees; none (< 0) if its query does not share the block.
__device__ __forceinline__ int last_visible_in(const SharedSubBlock& block, const UnitRow& row) {
    const uint32_t bits = row.query_in_tile < 32 ? block.queries.bits[0] : block.queries.bits[1];
    const bool shares = bits >> row.query_in_tile % 32 & 1;
    return shares ? min(row.query + block.visible_offset, block.visible_end) : -1;
}

}  // namespace forward_shared
}  // namespace fsa
