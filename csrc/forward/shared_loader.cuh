// The loaders of the forward shared kernel: the warps that bring Q of one unit after the other, the partials of its rows, and
// K and V of the sub-blocks it shares, through the buffers of a CTA. They are as far ahead of the others as there is shared
// memory. The first one finds out what to load and starts K and V, the second one gathers Q, the last two look at V and
// gather partials.
#pragma once

#include "device/load_tile.cuh"
#include "device/tma.cuh"
#include "forward/query_stage.cuh"
#include "forward/shared_partials.cuh"
#include "forward/shared_pipeline.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

// What a unit attends to. Fetched long before it is looked at.
struct UnitList {
    int num_blocks = 0;  // that its tile shares
    int4 entry;          // of which sub-block first + lane is a part; some other one behind the list's end
    int scattered = 0;   // the most scattered slots of a query of the unit, among those that the lane looked at

    // Sub-blocks of the tile's list, 32 at a time, a lane each. The first ones before it is known how many blocks there are.
    __device__ __forceinline__ void fetch_blocks(const ForwardSharedParams& p, const Unit& unit, int first, int subs) {
        const int head_and_tile = unit.head * p.shared.num_tiles + unit.tile;
        const int last = (first == 0 ? p.shared.max_blocks : num_blocks) - 1;
        const int i = min((first + static_cast<int>(threadIdx.x) % 32) / subs, last);
        num_blocks = __ldg(p.shared.counts + head_and_tile);
        entry = __ldg(p.shared.blocks + static_cast<int64_t>(head_and_tile) * p.shared.max_blocks + i);
    }
    template <typename Traits>
    __device__ __forceinline__ void fetch(const ForwardSharedParams& p, const Unit& unit, int subs) {
        fetch_blocks(p, unit, 0, subs);
        const Geometry& g = p.geometry;
        const int lane = threadIdx.x % 32;
        const int first = make_unit_row(g, unit, 0).query_in_chunk,
                  last = make_unit_row(g, unit, Traits::kRows - 1).query_in_chunk;
        const int32_t* counts = p.shared.scattered_counts + static_cast<int64_t>(unit.head) * g.num_queries;
        scattered = max(__ldg(counts + min(first + lane, last)), __ldg(counts + min(first + lane + 32, last)));
        // All of it lies behind the chunk's last query, whose counts these are.
        if (!make_unit_row(g, unit, 0).exists()) scattered = 0;
        static_assert(kQueryTile <= 64, "two queries a lane");
    }
};

// Starts K or V of a load; one thread. Rows behind the sequence's end come along: nobody sees these keys.
template <typename Traits>
__device__ __forceinline__ void load_sub_blocks(
    uint32_t tile, const TensorMap& map, uint32_t landed, const Load<Traits>& load) {
    using Tile = typename Traits::Tile;
    mbarrier_arrive_expect(landed, Tile::kBytes);
#pragma unroll
    for (int sub = 0; sub < Traits::kSubBlocks; ++sub)
#pragma unroll
        for (int panel = 0; panel < Traits::kHeadDim / Tile::kPanelColumns; ++panel) {
            const uint32_t to = tile + panel * Tile::kPanelBytes + sub * Traits::Box::kPanelBytes;
            tma_load_3d(to, map, landed, panel * Tile::kPanelColumns, load.kv_head, load.blocks[sub].key_token);
        }
}

// Starts the loads of a CTA, one after the other, K of each before V of the one before: it is needed first. A warp.
template <typename Traits>
struct LoadStarter {
    const Pipeline<Traits>& pipeline;
    const Sm90Params& p;
    int n = 0;                    // loads whose K is started
    int sub_blocks = 0;           // of the next load, described so far
    bool values_missing = false;  // V of the load before is not started

    // Adds a sub-block, which lane `from` has, to the next load; starts that when it is complete. Lane 0 writes it, since
    // lane 0 also arrives: racecheck does not see an order through `__syncwarp`.
    __device__ __forceinline__ void add(const Unit& unit, int index, const SharedSubBlock& block, int from) {
        SharedSubBlock& added = pipeline.load(n).blocks[sub_blocks];
        const auto copy = [&](auto& to, auto x) {
            x = __shfl_sync(~0u, x, from);
            if (threadIdx.x % 32 == 0) to = x;
        };
        static_assert(sizeof(SharedSubBlock) == 5 * sizeof(int), "these are its fields");
        copy(added.queries.bits[0], block.queries.bits[0]);
        copy(added.queries.bits[1], block.queries.bits[1]);
        copy(added.key_token, block.key_token);
        copy(added.visible_offset, block.visible_offset);
        copy(added.visible_end, block.visible_end);
        if (++sub_blocks < Traits::kSubBlocks) return;
        sub_blocks = 0;
        describe(index, unit.kv_head, -1);
        pipeline.wait_empty(pipeline.state.keys_empty, n);
        if (threadIdx.x % 32 == 0) {
            const uint32_t landed = pipeline.own_barrier(pipeline.state.keys_landed, n);
            load_sub_blocks<Traits>(pipeline.k_tile(n), p.k_map, landed, pipeline.load(n));
        }
        start_values();
        values_missing = true;
        ++n;
    }
    // A load that has no K and V: partials of a unit from `first_partial` on, which others have copied; or -1 as the unit says
    // that there is nothing more.
    __device__ __forceinline__ void announce(int index, int first_partial) {
        describe(index, 0, first_partial);
        pipeline.wait_empty(pipeline.state.keys_empty, n);
        if (threadIdx.x % 32 == 0) pipeline.arrive(pipeline.state.keys_landed, n);
        start_values();
        pipeline.wait_empty(pipeline.state.values_empty, n);
        if (threadIdx.x % 32 == 0) pipeline.arrive(pipeline.state.values_landed, n);
        ++n;
    }

  private:
    // The load's buffers may still be in use: who has to ask for something else can do so already.
    __device__ __forceinline__ void describe(int index, int kv_head, int first_partial) {
        if (threadIdx.x % 32 > 0) return;
        Load<Traits>& load = pipeline.load(n);
        load.unit = index;
        load.kv_head = kv_head;
        load.first_partial = first_partial;
        pipeline.arrive_described(n);
    }
    __device__ __forceinline__ void start_values() {
        if (!values_missing) return;
        values_missing = false;
        const int before = n - 1;
        pipeline.wait_empty(pipeline.state.values_empty, before);
        if (threadIdx.x % 32 > 0) return;
        const uint32_t landed = pipeline.own_barrier(pipeline.state.values_landed, before);
        load_sub_blocks<Traits>(pipeline.v_tile(before), p.v_map, landed, pipeline.load(before));
    }
};

// The first loader: claims units, for CTAs take them as they get done, since these differ in length; asks for the queries,
// has the partials gathered, and starts the loads of the sub-blocks that a unit's queries share.
template <typename Traits>
__device__ __forceinline__ void start_loads(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32, subs = g.block_size / Traits::kSubBlockKeys;
    const int num_units = p.shared.num_tiles * g.num_heads * units_a_tile<Traits>(g);
    const auto claim = [&] { return lane == 0 ? atomicAdd(p.shared.next, 1) : 0; };  // lane 0 knows
    LoadStarter<Traits> loads = {pipeline, p};
    int index = __shfl_sync(~0u, claim(), 0);
    UnitList list;
    if (index < num_units) list.fetch<Traits>(p, make_unit<Traits>(g, index), subs);
    for (int u = 0;; ++u) {
        pipeline.want_queries(u, index < num_units ? index : -1);
        if (index >= num_units) break;
        const Unit unit = make_unit<Traits>(g, index);
        const int first_load = loads.n;
        int next_index = claim();  // long before it is asked for

        const int num_partials =
            static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(list.scattered))) * g.subs;
        for (int first = 0; first < num_partials; first += kPartialsALoad) loads.announce(index, first);

        const TileQueries own_queries = queries_of_unit<Traits>(g, unit);
        const int end = list.num_blocks * subs;
        int first = 0;
        do {
            const int i = first + lane;
            SharedSubBlock own = SharedSubBlock::none();
            if (i < end) own = make_sub_block<Traits>(g, list.entry, i - i / subs * subs);
            first += 32;
            if (first < end) {
                list.fetch_blocks(p, unit, first, subs);
            } else {
                next_index = __shfl_sync(~0u, next_index, 0);
                if (next_index < num_units) list.fetch<Traits>(p, make_unit<Traits>(g, next_index), subs);
            }
            const bool wanted = own.num_keys() > 0 && own.queries.overlap(own_queries);
            unsigned left = __ballot_sync(~0u, wanted);
            // What the last load lacks is some sub-block, without queries. Rows that attend to nothing have results, too.
            const auto lacks_some = [&] { return loads.sub_blocks > 0 || loads.n == first_load; };
            while (left != 0 || (first >= end && lacks_some())) {
                if (left == 0) own = SharedSubBlock::none();
                loads.add(unit, index, own, left == 0 ? 0 : __ffs(left) - 1);
                left &= left - 1;
            }
        } while (first < end);
        index = next_index;
    }
    loads.announce(-1, 0);
}

// The second loader.
template <typename Traits>
__device__ __forceinline__ void gather_wanted_queries(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    for (int u = 0;; ++u) {
        const int index = pipeline.wanted_queries(u);
        if (index < 0) return;
        const Unit unit = make_unit<Traits>(p.geometry, index);
        pipeline.wait_queries_empty(u);
#pragma unroll 1
        for (int warp = 0; warp < Traits::kWarps; ++warp) {
            const UnitRow row = make_unit_row(p.geometry, unit, warp * 16 + threadIdx.x % 16);
            forward_main::gather_queries<typename Traits::T, Traits::kHeadDim>(
                pipeline.memory + pipeline.stage_offset(u, warp), p.geometry, p.q, unit.kv_head, row);
        }
        cp_async_commit();
        cp_async_wait<0>();
        pipeline.arrive_queries(u);
    }
}

// The other loaders, kCheckers of them: hand over what has landed, with zeros for inf and NaN among the values. Of partials
// each of them has one copied.
template <typename Traits>
__device__ __forceinline__ void check_values(const Pipeline<Traits>& pipeline, int checker, const Sm90Params& p) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    constexpr int kThreads = Traits::kCheckers * 32;
    static_assert(Traits::kCheckers == kPartialsALoad, "a partial each");
    auto& state = pipeline.state;
    PartialCopier<Traits> copier = {pipeline, p, checker};
    for (int n = 0;; ++n) {
        pipeline.wait_described(n);
        const Load<Traits>& load = pipeline.load(n);
        if (load.unit < 0) return;
        if (load.first_partial >= 0) {
            // A barrier must not end its next phase before all who wait for this one have seen it end. The first loader
            // waits for V's buffer late, so it says when that is free. It says nothing of K's but that K has landed: later
            // than V, maybe.
            copier.copy(n, load, checker == 0 ? state.keys_full : state.values_full, [&] {
                if (checker == 0) {
                    pipeline.wait_empty(state.keys_empty, n);
                } else {
                    pipeline.wait(state.values_landed, n);
                }
            });
            if (checker > 0) pipeline.arrive(state.values_full, n);  // for the other one, who may be a load ahead
            continue;
        }
        pipeline.wait(state.values_landed, n);
        // So that the barrier has a phase for every load. Waiting costs nothing, and synccheck wants it of who arrives.
        if (checker == 0) {
            pipeline.arrive(state.keys_full, n);
            pipeline.wait(state.keys_full, n);
        }
        // Rows behind the sequence's end came along.
        const auto in_sequence = [&](uint32_t offset) {
            const int row = offset / Tile::kRowBytes % Tile::kNumRows;
            return row % Traits::kSubBlockKeys < load.blocks[row / Traits::kSubBlockKeys].num_keys();
        };
        const bool nonfinite =
            __any_sync(~0u, zero_nonfinite_in_share<T, Tile::kBytes, kThreads>(pipeline.v_tile(n), in_sequence));
        if (threadIdx.x % 32 == 0) state.nonfinite_values[pipeline.buffer(n)][checker] = nonfinite;
        pipeline.arrive(state.values_full, n);
    }
}

template <typename Traits>
__device__ __forceinline__ void run_loader(const Pipeline<Traits>& pipeline, int loader, const Sm90Params& p) {
    static_assert(Traits::kLoaders == 2 + Traits::kCheckers);
    if (loader == 0) {
        start_loads(pipeline, p);
    } else if (loader == 1) {
        gather_wanted_queries(pipeline, p);
    } else {
        check_values(pipeline, loader - 2, p);
    }
}

}  // namespace forward_shared
}  // namespace fsa
