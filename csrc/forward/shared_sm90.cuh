// The forward shared kernel for Hopper: query-outer over the blocks that a query tile shares, where main is KV-outer over
// the rest. The unit of work is some rows of a query tile: their queries stay in shared memory, O in registers over all
// shared blocks, with an online softmax, and one partial a row is left. Rows of queries that did not select a block are
// masked: the tensor cores have room for them, memory has not.
//
// Some warps of a CTA, the loaders, bring the queries of one unit after the other and K and V of its blocks; they are as far
// ahead of the others as there is shared memory.
#pragma once

#include <type_traits>

#include "device/load_tile.cuh"
#include "device/softmax.cuh"
#include "forward/query_stage.cuh"
#include "forward/query_tile.cuh"
#include "forward/shared.h"
#include "forward/shared_sm90_traits.h"
#include "launch.h"

namespace fsa {
namespace forward_shared {

using namespace forward_main;

template <typename Traits>
using Output = float[Traits::kPasses][Traits::kColumns / 2];

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

__device__ __forceinline__ SharedSubBlock of_lane(SharedSubBlock block, int lane) {
    for (int* x : {&block.key_token, &block.num_keys, &block.visible_offset, &block.visible_end})
        *x = __shfl_sync(~0u, *x, lane);
    for (uint32_t& bits : block.queries.bits) bits = __shfl_sync(~0u, bits, lane);
    return block;
}

// The sub-blocks of a tile's list, 32 at a time, a lane each. Fetched long before they are looked at.
struct Entries {
    int count = 0;  // of the list
    int4 entry;     // to which sub-block first + lane belongs; anything behind the end

    __device__ __forceinline__ void fetch(const ForwardSharedParams& p, int head, int tile, int first, int subs) {
        const int head_and_tile = head * p.shared.num_tiles + tile;
        const int i = min((first + static_cast<int>(threadIdx.x) % 32) / subs, p.shared.max_blocks - 1);
        count = __ldg(p.shared.counts + head_and_tile);
        entry = __ldg(p.shared.blocks + static_cast<int64_t>(head_and_tile) * p.shared.max_blocks + i);
    }
};

// A sub-block on its way through a CTA, with K and V; the first of a unit has its queries with it.
template <typename Traits>
struct Load {
    int unit;  // -1 behind the last
    bool last_of_unit;
    bool nonfinite_values[Traits::kLoaders];  // V held inf or NaN, as each loader saw it
    SharedSubBlock block;
};

// Load n has buffer n % kBuffers, unit u of a CTA the queries' buffer u % kQueryBuffers; phase n / kBuffers of `full` and
// `empty`, phase u / kQueryBuffers of `queries_empty` are theirs.
template <typename Traits>
struct Pipeline {
    struct State {
        uint64_t full[Traits::kBuffers];   // all loaders have brought their part
        uint64_t empty[Traits::kBuffers];  // all other warps are done
        uint64_t queries_empty[Traits::kQueryBuffers];
        uint64_t claimed[2];  // phase k / 2 of claimed[k % 2], claim_empty[k % 2]: of claim k
        uint64_t claim_empty[2];
        int claims[2];  // units
        Load<Traits> loads[Traits::kBuffers];
    };
    static_assert(sizeof(State) <= Traits::kStateBytes);

    State& state;
    uint32_t memory;  // shared-memory address of the buffers

    __device__ __forceinline__ Load<Traits>& load(int n) const {
        return state.loads[n % Traits::kBuffers];
    }
    __device__ __forceinline__ uint32_t k_tile(int n) const {
        return memory + n % Traits::kBuffers * 2 * Traits::Tile::kBytes;
    }
    __device__ __forceinline__ uint32_t v_tile(int n) const {
        return k_tile(n) + Traits::Tile::kBytes;
    }
    // Offset of a warp's queries of unit u.
    __device__ __forceinline__ uint32_t stage_offset(int u, int warp) const {
        return Traits::kQueriesOffset + u % Traits::kQueryBuffers * Traits::kQueryBytes + warp * Traits::Stage::kBytes;
    }

    // One thread; a barrier of the CTA follows.
    __device__ __forceinline__ void init() const {
        for (uint64_t& barrier : state.full) mbarrier_init(shared_address(&barrier), Traits::kLoaders);
        for (uint64_t& barrier : state.empty) mbarrier_init(shared_address(&barrier), Traits::kWarps);
        for (uint64_t& barrier : state.queries_empty) mbarrier_init(shared_address(&barrier), Traits::kWarps);
        for (uint64_t& barrier : state.claimed) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.claim_empty) mbarrier_init(shared_address(&barrier), Traits::kLoaders);
    }
    // These by whole warps.
    __device__ __forceinline__ void arrive(uint64_t& barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&barrier));
    }
    __device__ __forceinline__ void arrive_full(int n) const {
        arrive(state.full[n % Traits::kBuffers]);
    }
    __device__ __forceinline__ void arrive_empty(int n) const {
        arrive(state.empty[n % Traits::kBuffers]);
    }
    __device__ __forceinline__ void arrive_queries_empty(int u) const {
        arrive(state.queries_empty[u % Traits::kQueryBuffers]);
    }
    __device__ __forceinline__ void wait_full(int n) const {
        mbarrier_wait(shared_address(&state.full[n % Traits::kBuffers]), n / Traits::kBuffers % 2);
    }
    // Claim k, for all loaders: CTAs take units as they get done, for these differ in length. `ahead` is that of the first
    // loader's first lane, which has claimed it long before it is asked for.
    __device__ __forceinline__ int claim(int k, int loader, int& ahead, int32_t* next) const {
        if (loader == 0) {
            if (k >= 2) mbarrier_wait(shared_address(&state.claim_empty[k % 2]), (k / 2 - 1) % 2);
            if (threadIdx.x % 32 == 0) {
                state.claims[k % 2] = ahead;
                mbarrier_arrive(shared_address(&state.claimed[k % 2]));
                ahead = atomicAdd(next, 1);
            }
        }
        __syncwarp();
        mbarrier_wait(shared_address(&state.claimed[k % 2]), k / 2 % 2);
        const int index = state.claims[k % 2];
        arrive(state.claim_empty[k % 2]);
        return index;
    }
    // The buffers that load n and unit u are to have; free at the beginning.
    __device__ __forceinline__ void wait_empty(int n) const {
        if (n < Traits::kBuffers) return;
        mbarrier_wait(shared_address(&state.empty[n % Traits::kBuffers]), (n / Traits::kBuffers - 1) % 2);
    }
    __device__ __forceinline__ void wait_queries_empty(int u) const {
        if (u < Traits::kQueryBuffers) return;
        mbarrier_wait(
            shared_address(&state.queries_empty[u % Traits::kQueryBuffers]), (u / Traits::kQueryBuffers - 1) % 2);
    }
};

// A loader's part of K and V of a load.
template <typename Traits>
__device__ __forceinline__ void load_kv_block(
    const Pipeline<Traits>& pipeline, int n, const ForwardSharedParams& p, int kv_head, const SharedSubBlock& block) {
    using T = typename Traits::T;
    constexpr int kThreads = Traits::kLoaders * 32;
    const auto source = [&](const RowTensor& t) -> TileSource<T> {
        return {row_pointer<T>(t, block.key_token, kv_head), t.token_stride, block.num_keys, p.geometry.head_dim / 8};
    };
    load_tile_async<T, Traits::kTileK, Traits::kHeadDim, kThreads, typename Traits::Tile>(
        pipeline.k_tile(n), source(p.k));
    load_tile_async<T, Traits::kTileK, Traits::kHeadDim, kThreads, typename Traits::Tile>(
        pipeline.v_tile(n), source(p.v));
}

// A loader's part of a load that came with all of its commits but the last kPending: looks at V, and hands it over.
template <typename Traits, int kPending>
__device__ __forceinline__ void finish_load(const Pipeline<Traits>& pipeline, int n, int loader, bool last_of_unit) {
    cp_async_wait<kPending>();
    const TileMagnitude values = zero_nonfinite_in_tile<
        typename Traits::T, Traits::kTileK, Traits::kHeadDim, Traits::kLoaders * 32, typename Traits::Tile>(
        pipeline.v_tile(n));
    const bool nonfinite = __any_sync(~0u, values.nonfinite);
    if (threadIdx.x % 32 == 0) {
        pipeline.load(n).nonfinite_values[loader] = nonfinite;
        if (loader == 0) pipeline.load(n).last_of_unit = last_of_unit;
    }
    fence_async_proxy();
    pipeline.arrive_full(n);
}

template <typename Traits>
__device__ __forceinline__ void gather_unit(
    const Pipeline<Traits>& pipeline, int u, int loader, const ForwardSharedParams& p, const Unit& unit) {
#pragma unroll 1
    for (int warp = loader; warp < Traits::kWarps; warp += Traits::kLoaders) {
        const UnitRow row = make_unit_row(p.geometry, unit, warp * 16 + threadIdx.x % 16);
        gather_queries<typename Traits::T, Traits::kHeadDim>(
            pipeline.memory + pipeline.stage_offset(u, warp), p.geometry, p.q, unit.kv_head, row);
    }
}

template <typename Traits>
__device__ __forceinline__ void run_loader(const Pipeline<Traits>& pipeline, int loader, const ForwardSharedParams& p) {
    const Geometry& g = p.geometry;
    const Units<Traits> units(g);
    const int lane = threadIdx.x % 32, subs = g.block_size / Traits::kTileK, num_units = units.count(p);
    const auto fetch = [&](Entries& entries, int index, int tile, int first) {
        const Unit unit = units.unit(p, index);
        if (tile < unit.num_tiles) entries.fetch(p, unit.head, unit.first_tile + tile, first, subs);
    };
    const bool leader = loader == 0 && lane == 0;
    int ahead = leader ? atomicAdd(p.shared.next, 1) : 0, claims = 0;
    const auto claim = [&] { return pipeline.claim(claims++, loader, ahead, p.shared.next); };
    int n = 0, u = 0, index = claim(), tile = 0;
    bool first_of_unit = true;
    Entries next;
    if (index < num_units) fetch(next, index, 0, 0);
    while (index < num_units) {
        const Unit unit = units.unit(p, index);
        Entries entries = next;
        const bool last_tile = tile + 1 >= unit.num_tiles;
        const int next_index = last_tile ? claim() : index, next_tile = last_tile ? 0 : tile + 1;
        if (next_index < num_units) fetch(next, next_index, next_tile, 0);
        // Of the tile's queries those that are the unit's
        const TileQueries own_queries =
            queries_of_rows(g, unit, tile * kQueryTile * g.group_size, min(Traits::kRows, kQueryTile * g.group_size));
        const int end = entries.count * subs;
        for (int first = 0; first < end; first += 32) {
            if (first > 0) fetch(entries, index, tile, first);
            const int i = first + lane;
            SharedSubBlock own = {};
            own.queries.tile = tile;
            if (i < end) own = make_sub_block<Traits>(g, tile, entries.entry, i - i / subs * subs);
            const bool wanted = own.num_keys > 0 && own.queries.overlaps(own_queries);
            for (unsigned left = __ballot_sync(~0u, wanted); left != 0; left &= left - 1) {
                const SharedSubBlock block = of_lane(own, __ffs(left) - 1);
                if (first_of_unit) {
                    pipeline.wait_queries_empty(u);
                    gather_unit(pipeline, u, loader, p, unit);
                }
                pipeline.wait_empty(n);
                load_kv_block<Traits>(pipeline, n, p, unit.kv_head, block);
                cp_async_commit();
                if (leader) {
                    pipeline.load(n).unit = index;
                    pipeline.load(n).block = block;
                }
                if (n > 0) finish_load<Traits, 1>(pipeline, n - 1, loader, first_of_unit);
                first_of_unit = false;
                ++n;
            }
        }
        if (last_tile && !first_of_unit) {
            ++u;
            first_of_unit = true;
        }
        index = next_index;
        tile = next_tile;
    }
    if (n > 0) finish_load<Traits, 0>(pipeline, n - 1, loader, true);
    pipeline.wait_empty(n);
    if (leader) pipeline.load(n).unit = -1;
    pipeline.arrive_full(n);
}

// The row with the last key of the sub-block that it sees; none if its query does not share the block.
__device__ __forceinline__ QueryRow row_in_block(const UnitRow& unit_row, const SharedSubBlock& block) {
    QueryRow row = unit_row;
    const uint32_t bits = unit_row.query_in_tile < 32 ? block.queries.bits[0] : block.queries.bits[1];
    const bool shares = unit_row.tile == block.queries.tile && (bits >> unit_row.query_in_tile % 32 & 1);
    row.last_visible = shares ? min(row.query + block.visible_offset, block.visible_end) : -1;
    return row;
}

// Of the two rows of a lane. A lane sums its own columns; the quad adds up at the end.
struct OnlineSoftmax {
    float reference[2] = {-INFINITY, -INFINITY};  // what exponents count from, log2: near the largest score so far
    float sum[2] = {0.f, 0.f};
};

// log2 of what P is divided by: O sums up to 2^16 values before it is normalised, and those of bf16 reach 2^128.
template <typename T>
constexpr float kHeadroom = std::is_same_v<T, __half> ? 0.f : 16.f;

// Scores may exceed the reference by this much, log2, before O is scaled to a new one.
constexpr float kSlack = 8.f;

// P = 2^(S - reference - kHeadroom), not normalised. Rows that do not share the block (`row`, a lane's description) get
// zeros by a choice, not by their scores: those may be NaN.
template <typename Traits>
__device__ __forceinline__ void update_softmax(
    Probs<Traits>& probs, OnlineSoftmax& softmax, Output<Traits>& o, Scores<Traits>& s, const QueryRow& row,
    float scale_log2) {
    const int lane = threadIdx.x % 32;
    if (__any_sync(~0u, row.last_visible >= 0 && row.last_visible < Traits::kTileK - 1)) mask_invisible<Traits>(s, row);
    bool shares[2], grows = false;
    float maximum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        shares[i] = __shfl_sync(~0u, row.last_visible, 8 * i + lane / 4) >= 0;
        maximum[i] = s[0][0][2 * i];
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n)
            maximum[i] = fmaxf(maximum[i], fmaxf(s[0][n][2 * i], s[0][n][2 * i + 1]));
        maximum[i] = quad_max(maximum[i]);
        maximum[i] = shares[i] ? maximum[i] * scale_log2 : -INFINITY;
        grows |= maximum[i] > softmax.reference[i] + kSlack;
    }
    if (__any_sync(~0u, grows)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float reference = fmaxf(softmax.reference[i], maximum[i]);
            const float kept = exp2_approx(softmax.reference[i] - finite_shift(reference));
            softmax.reference[i] = reference;
            softmax.sum[i] *= kept;
#pragma unroll
            for (int pass = 0; pass < Traits::kPasses; ++pass)
#pragma unroll
                for (int x = 2 * i; x < Traits::kColumns / 2; x += 4) {
                    o[pass][x] *= kept;
                    o[pass][x + 1] *= kept;
                }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float shift = finite_shift(softmax.reference[i]) + kHeadroom<typename Traits::T>;
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n) {
            const float x = exp2_approx(fmaf(s[0][n][2 * i], scale_log2, -shift)),
                        y = exp2_approx(fmaf(s[0][n][2 * i + 1], scale_log2, -shift));
            sums[0] += x;
            sums[1] += y;
            probs[0][n][i] = shares[i] ? HalfType<typename Traits::T>::pack(x, y) : 0;
        }
        softmax.sum[i] += shares[i] ? sums[0] + sums[1] : 0.f;
    }
}

// O += P V
template <typename Traits>
__device__ __forceinline__ void accumulate_pv(Output<Traits>& o, const Probs<Traits>& probs, uint32_t v_tile) {
    wgmma_fence();
#pragma unroll
    for (int pass = 0; pass < Traits::kPasses; ++pass)
        compute_pv_columns<Traits, Traits::kColumns>(o[pass], probs, v_tile, pass * Traits::kColumns, true);
    wgmma_commit();
    wgmma_wait<0>();
}

// The power of two by which a row of O is divided, so that fp16 holds it: the row's largest element comes near 2^15.
__device__ __forceinline__ int row_exponent(float largest) {
    return largest > 0.f && largest < INFINITY ? min(max(ilogbf(largest) - 14, -100), 113) : 0;
}

// Normalises O, puts it into the stage, and log-sum-exps and exponents into memory.
template <typename Traits>
__device__ __forceinline__ void finish_rows(
    uint32_t stage, Output<Traits>& o, const OnlineSoftmax& softmax, const ForwardSharedParams& p, int head,
    const QueryRow& row) {
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    float scale[2], lse[2];
    int exponent[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(softmax.sum[i]), inverse = reciprocal_or_zero(sum);
        float largest = 0.f;
#pragma unroll
        for (int pass = 0; pass < Traits::kPasses; ++pass)
#pragma unroll
            for (int x = 2 * i; x < Traits::kColumns / 2; x += 4)
                largest = fmaxf(largest, fmaxf(fabsf(o[pass][x]), fabsf(o[pass][x + 1])));
        exponent[i] = row_exponent(quad_max(largest) * inverse);
        scale[i] = inverse * power_of_two(-exponent[i]);
        lse[i] = log2_sum_exp(finite_shift(softmax.reference[i]) + kHeadroom<typename Traits::T>, sum);
    }
#pragma unroll
    for (int pass = 0; pass < Traits::kPasses; ++pass) {
#pragma unroll
        for (int i = 0; i < Traits::kColumns / 2; ++i) o[pass][i] *= scale[i / 2 % 2];
        output_to_stage<Traits::kHeadDim, Traits::kColumns>(stage, o[pass], pass * Traits::kColumns);
    }
    // Lane i < 16 stores those of row i, which the quad of row i % 8 has as its row i / 8.
    const int from = lane % 8 * 4, which = lane / 8 % 2;
    const float lse_0 = __shfl_sync(~0u, lse[0], from), lse_1 = __shfl_sync(~0u, lse[1], from);
    const int exponent_0 = __shfl_sync(~0u, exponent[0], from), exponent_1 = __shfl_sync(~0u, exponent[1], from);
    if (lane < 16 && row.partial_row >= 0) {
        p.lse_partial[first_partial_row(g, head) + row.partial_row] = which == 0 ? lse_0 : lse_1;
        const int64_t query = static_cast<int64_t>(head) * g.num_queries + (row.query - g.query_begin);
        p.shared_exponent[query * g.group_size + row.group_head] = which == 0 ? exponent_0 : exponent_1;
    }
}

// What inf and NaN among the values of the unit's blocks contribute to a warp's rows of O, which are in the stage.
template <typename Traits>
__device__ __forceinline__ void restore_unit(
    __half* stage, const ForwardSharedParams& p, const Unit& unit, const UnitRow& row) {
    const Geometry& g = p.geometry;
    const int subs = g.block_size / Traits::kTileK;
    for (int tile = 0; tile < unit.num_tiles; ++tile) {
        const int head_and_tile = unit.head * p.shared.num_tiles + unit.first_tile + tile;
        const int4* entries = p.shared.blocks + static_cast<int64_t>(head_and_tile) * p.shared.max_blocks;
        const int end = __ldg(p.shared.counts + head_and_tile) * subs;
#pragma unroll 1
        for (int i = 0; i < end; ++i) {
            const SharedSubBlock block = make_sub_block<Traits>(g, tile, __ldg(entries + i / subs), i % subs);
            restore_nonfinite_values<Traits>(
                row_pointer<typename Traits::T>(p.v, block.key_token, unit.kv_head), p.v.token_stride, block.num_keys,
                g.head_dim, row_in_block(row, block),
                [&](int r, int) { return stage + r * Traits::Stage::kRowPitch / 2; });
        }
    }
}

// A unit from load n on: its partials. Returns the first load of the next unit.
template <typename Traits>
__device__ __forceinline__ int run_unit(
    const Pipeline<Traits>& pipeline, unsigned char* memory, int n, int u, const ForwardSharedParams& p) {
    const Geometry& g = p.geometry;
    const int warp = threadIdx.x / 32;
    const uint32_t stage = pipeline.memory + pipeline.stage_offset(u, warp);
    const Unit unit = Units<Traits>(g).unit(p, pipeline.load(n).unit);
    const TileQueries own_queries = queries_of_rows(g, unit, warp / 4 * 64, 64);  // of the warpgroup
    UnitRow row = make_unit_row(g, unit, warp * 16 + threadIdx.x % 16);
    // Asked for now, looked at behind the loop.
    const int slot = __ldg(p.shared.slots + static_cast<int64_t>(unit.head) * g.num_queries + row.query_in_chunk);

    Output<Traits> o = {};
    OnlineSoftmax softmax;
    bool nonfinite_values = false;
    for (bool more = true; more; ++n) {
        pipeline.wait_full(n);
        const Load<Traits>& load = pipeline.load(n);
        more = !load.last_of_unit;
        if (load.block.queries.overlaps(own_queries)) {
            for (const bool seen : load.nonfinite_values) nonfinite_values |= seen;
            Scores<Traits> s;
            Probs<Traits> probs;
            compute_scores_sm90<Traits>(s, stage, pipeline.k_tile(n));
            update_softmax<Traits>(probs, softmax, o, s, row_in_block(row, load.block), p.softmax_scale_log2);
            accumulate_pv<Traits>(o, probs, pipeline.v_tile(n));
        }
        pipeline.arrive_empty(n);
    }

    if (row.exists && slot >= 0)
        row.partial_row = (row.query_in_chunk * g.topk + slot) * g.subs * g.group_size + row.group_head;
    finish_rows<Traits>(stage, o, softmax, p, unit.head, row);
    if (nonfinite_values) {
        __syncwarp();
        restore_unit<Traits>(reinterpret_cast<__half*>(memory + pipeline.stage_offset(u, warp)), p, unit, row);
    }
    store_partials<Traits::kHeadDim>(
        stage, p.o_partial + first_partial_row(g, unit.head) * g.head_dim, g.head_dim, row);
    pipeline.arrive_queries_empty(u);
    return n;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_shared_sm90(const __grid_constant__ ForwardSharedParams p) {
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    using State = typename Pipeline<Traits>::State;
    const Pipeline<Traits> pipeline = {
        *reinterpret_cast<State*>(memory + Traits::kStateOffset), shared_address(memory)};
    if (threadIdx.x == 0) pipeline.init();
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp >= Traits::kWarps) {
        run_loader<Traits>(pipeline, warp - Traits::kWarps, p);
        return;
    }
    int n = 0;
    for (int u = 0;; ++u) {
        pipeline.wait_full(n);
        if (pipeline.load(n).unit < 0) return;
        n = run_unit<Traits>(pipeline, memory, n, u, p);
    }
}

}  // namespace forward_shared

template <typename T, int kHeadDim>
void launch_forward_shared_sm90(const ForwardSharedParams& p, cudaStream_t stream) {
    using Traits = ForwardSharedTraits<T, kHeadDim>;
    const auto kernel = forward_shared::forward_shared_sm90<Traits>;
    launch("forward_shared_sm90", kernel, {dim3(sm_count()), Traits::kThreads, Traits::kSharedBytes}, p, stream);
}

}  // namespace fsa
