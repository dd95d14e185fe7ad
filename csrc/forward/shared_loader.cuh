// The loaders of the forward shared kernel: the warps that bring Q of one unit after the other, and K and V of the sub-blocks
// it shares, through the buffers of a CTA. They are as far ahead of the others as there is shared memory. The first one finds
// out what to load and starts K and V, the second one gathers Q, the last two look at V.
#pragma once

#include "device/load_tile.cuh"
#include "device/tma.cuh"
#include "forward/query_stage.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

struct Sm90Params : ForwardSharedParams {
    TensorMap k_map, v_map;
};

// The sub-blocks of a tile's list, 32 at a time, a lane each. Fetched long before they are looked at.
struct Entries {
    int count = 0;  // of the list
    int4 entry;     // of which sub-block first + lane is a part; some other one behind the list's end

    __device__ __forceinline__ void fetch(const ForwardSharedParams& p, int head, int tile, int first, int subs) {
        const int head_and_tile = head * p.shared.num_tiles + tile;
        const int i = min((first + static_cast<int>(threadIdx.x) % 32) / subs, p.shared.max_blocks - 1);
        count = __ldg(p.shared.counts + head_and_tile);
        entry = __ldg(p.shared.blocks + static_cast<int64_t>(head_and_tile) * p.shared.max_blocks + i);
    }
};

// Some sub-blocks on their way through a CTA.
template <typename Traits>
struct Load {
    int unit;     // -1 behind the last
    int kv_head;  // of the tensors
    SharedSubBlock blocks[Traits::kSubBlocks];
};

// Load n has buffer n % kBuffers, once for K and once for V; the u-th unit of a CTA that has loads has the queries' buffer
// u % kQueryBuffers. Phase n / kBuffers (u / kQueryBuffers) of a buffer's barriers is theirs. The values of a load are
// needed, and gone, later than its keys.
template <typename Traits>
struct Pipeline {
    static constexpr int kDescriptions = 2 * Traits::kBuffers;

    struct State {
        uint64_t keys_landed[Traits::kBuffers];  // K and the load's description are there
        uint64_t keys_empty[Traits::kBuffers];   // all warps that multiply are done
        uint64_t values_landed[Traits::kBuffers];
        uint64_t values_full[Traits::kBuffers];  // V has been looked at
        uint64_t values_empty[Traits::kBuffers];
        uint64_t queries_wanted[Traits::kQueryBuffers];
        uint64_t queries_full[Traits::kQueryBuffers];
        uint64_t queries_empty[Traits::kQueryBuffers];
        uint64_t turns[2];  // whose phase n ends when it is a warpgroup's turn to begin the products of load n
        int units[Traits::kQueryBuffers];  // whose queries are wanted; -1 behind the last
        // V held inf or NaN, as each of those who look saw it.
        bool nonfinite_values[Traits::kBuffers][Traits::kCheckers];
        // Load n has n % kDescriptions. It is written for a later one once V of load n + kBuffers - 2 is empty.
        Load<Traits> loads[kDescriptions];
    };
    static_assert(sizeof(State) <= Traits::kStateBytes);

    State& state;
    uint32_t memory;  // shared-memory address of the buffers

    // Of load n, of unit u. Unsigned: a power of two then takes an instruction.
    static __device__ __forceinline__ unsigned buffer(int n) {
        return static_cast<unsigned>(n) % Traits::kBuffers;
    }
    static __device__ __forceinline__ unsigned parity(int n) {
        return static_cast<unsigned>(n) / Traits::kBuffers % 2;
    }
    static __device__ __forceinline__ unsigned query_buffer(int u) {
        return static_cast<unsigned>(u) % Traits::kQueryBuffers;
    }
    static __device__ __forceinline__ unsigned query_parity(int u) {
        return static_cast<unsigned>(u) / Traits::kQueryBuffers % 2;
    }
    __device__ __forceinline__ Load<Traits>& load(int n) const {
        return state.loads[static_cast<unsigned>(n) % kDescriptions];
    }
    __device__ __forceinline__ uint32_t k_tile(int n) const {
        return memory + buffer(n) * Traits::Tile::kBytes;
    }
    __device__ __forceinline__ uint32_t v_tile(int n) const {
        return k_tile(n) + Traits::kValuesOffset;
    }
    // Offset of a warp's queries of unit u.
    __device__ __forceinline__ uint32_t stage_offset(int u, int warp) const {
        return Traits::kQueriesOffset + query_buffer(u) * Traits::kQueryBytes + warp * Traits::Stage::kBytes;
    }

    // One thread; a barrier of the CTA follows. Who has read or written data arrives for itself, thread by thread: racecheck
    // does not see what a lane that arrives for its warp knows of the others.
    __device__ __forceinline__ void init() const {
        constexpr int kConsumers = 32 * Traits::kWarps;
        for (uint64_t& barrier : state.keys_landed) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.keys_empty) mbarrier_init(shared_address(&barrier), kConsumers);
        for (uint64_t& barrier : state.values_landed) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.values_full) mbarrier_init(shared_address(&barrier), 32 * Traits::kCheckers);
        for (uint64_t& barrier : state.values_empty) mbarrier_init(shared_address(&barrier), kConsumers);
        for (uint64_t& barrier : state.queries_wanted) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.queries_full) mbarrier_init(shared_address(&barrier), 32);
        for (uint64_t& barrier : state.queries_empty) mbarrier_init(shared_address(&barrier), kConsumers);
        for (uint64_t& barrier : state.turns) mbarrier_init(shared_address(&barrier), 4);  // warps of the other one
        fence_async_proxy();  // the copy engine arrives, too
    }
    // The barriers of load n.
    __device__ __forceinline__ uint32_t own_barrier(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        return shared_address(&barriers[buffer(n)]);
    }
    __device__ __forceinline__ void wait(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        mbarrier_wait(own_barrier(barriers, n), parity(n));
    }
    __device__ __forceinline__ void arrive(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        mbarrier_arrive(own_barrier(barriers, n));
    }
    // Until the load that had the buffer before load n is done with it; free at the beginning.
    __device__ __forceinline__ void wait_empty(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        if (n >= Traits::kBuffers) wait(barriers, n - Traits::kBuffers);
    }
    // Once values_full says so.
    __device__ __forceinline__ bool has_nonfinite_values(int n) const {
        bool any = false;
        for (const bool seen : state.nonfinite_values[buffer(n)]) any |= seen;
        return any;
    }

    // A warp asks for the queries of a unit, or says with -1 that there are no more.
    __device__ __forceinline__ void want_queries(int u, int unit) const {
        if (u >= Traits::kQueryBuffers) wait_queries(u - Traits::kQueryBuffers);  // `units` has been read
        if (threadIdx.x % 32 > 0) return;
        state.units[query_buffer(u)] = unit;
        mbarrier_arrive(shared_address(&state.queries_wanted[query_buffer(u)]));
    }
    __device__ __forceinline__ int wanted_queries(int u) const {
        mbarrier_wait(shared_address(&state.queries_wanted[query_buffer(u)]), query_parity(u));
        return state.units[query_buffer(u)];
    }
    __device__ __forceinline__ void arrive_queries(int u) const {
        mbarrier_arrive(shared_address(&state.queries_full[query_buffer(u)]));
    }
    __device__ __forceinline__ void wait_queries(int u) const {
        mbarrier_wait(shared_address(&state.queries_full[query_buffer(u)]), query_parity(u));
    }
    __device__ __forceinline__ void arrive_queries_empty(int u) const {
        mbarrier_arrive(shared_address(&state.queries_empty[query_buffer(u)]));
    }
    __device__ __forceinline__ void wait_queries_empty(int u) const {
        if (u < Traits::kQueryBuffers) return;
        mbarrier_wait(shared_address(&state.queries_empty[query_buffer(u)]), query_parity(u - Traits::kQueryBuffers));
    }

    // Two warpgroups begin their products in turn, load by load: left alone they fall into step, and the tensor cores rest
    // while both have their softmax. No data depends on it. The second one passes once before its first load.
    __device__ __forceinline__ void await_turn(int warpgroup, int n) const {
        if (Traits::kWarpgroups == 2) mbarrier_wait(shared_address(&state.turns[warpgroup]), n & 1);
    }
    __device__ __forceinline__ void pass_turn(int warpgroup) const {
        if (Traits::kWarpgroups == 2 && threadIdx.x % 32 == 0)
            mbarrier_arrive(shared_address(&state.turns[1 - warpgroup]));
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
    int n = 0;  // loads whose K is started

    __device__ __forceinline__ void start(const Load<Traits>& load) {
        pipeline.wait_empty(pipeline.state.keys_empty, n);
        if (threadIdx.x % 32 == 0) {
            pipeline.load(n) = load;
            const uint32_t landed = pipeline.own_barrier(pipeline.state.keys_landed, n);
            load_sub_blocks<Traits>(pipeline.k_tile(n), p.k_map, landed, load);
        }
        start_values();
        ++n;
    }
    // Tells everyone that there are no more.
    __device__ __forceinline__ void finish() {
        pipeline.wait_empty(pipeline.state.keys_empty, n);
        if (threadIdx.x % 32 == 0) {
            pipeline.load(n).unit = -1;
            pipeline.arrive(pipeline.state.keys_landed, n);
        }
        start_values();
        pipeline.wait_empty(pipeline.state.values_empty, n);
        if (threadIdx.x % 32 == 0) pipeline.arrive(pipeline.state.values_landed, n);
    }

  private:
    // Of the load before.
    __device__ __forceinline__ void start_values() {
        if (n == 0) return;
        const int before = n - 1;
        pipeline.wait_empty(pipeline.state.values_empty, before);
        if (threadIdx.x % 32 > 0) return;
        const uint32_t landed = pipeline.own_barrier(pipeline.state.values_landed, before);
        load_sub_blocks<Traits>(pipeline.v_tile(before), p.v_map, landed, pipeline.load(before));
    }
};

__device__ __forceinline__ SharedSubBlock of_lane(SharedSubBlock block, int lane) {
    for (int* x : {&block.key_token, &block.num_keys, &block.visible_offset, &block.visible_end})
        *x = __shfl_sync(~0u, *x, lane);
    for (uint32_t& bits : block.queries.bits) bits = __shfl_sync(~0u, bits, lane);
    return block;
}

// Sub-block `sub` of a load in registers: no index that is known at run time only.
template <typename Traits>
__device__ __forceinline__ void gather_sub_block(Load<Traits>& load, int sub, const SharedSubBlock& block) {
#pragma unroll
    for (int i = 0; i < Traits::kSubBlocks; ++i)
        if (i == sub) load.blocks[i] = block;
}

// The first loader: claims units, for CTAs take them as they get done, since these differ in length; starts the loads of
// the sub-blocks that a unit's queries share, and asks for the queries.
template <typename Traits>
__device__ __forceinline__ void start_loads(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32, subs = g.block_size / Traits::kSubBlockKeys;
    const int num_units = p.shared.num_tiles * g.num_heads * units_a_tile<Traits>(g);
    int ahead = lane == 0 ? atomicAdd(p.shared.next, 1) : 0;  // claimed long before it is asked for
    const auto claim = [&] {
        const int index = __shfl_sync(~0u, ahead, 0);
        if (lane == 0) ahead = atomicAdd(p.shared.next, 1);
        return index;
    };
    const auto fetch = [&](Entries& entries, int index, int first) {
        const Unit unit = make_unit<Traits>(g, index);
        entries.fetch(p, unit.head, unit.tile, first, subs);
    };
    LoadStarter<Traits> loads = {pipeline, p};
    int u = 0, index = claim();
    Entries next;
    if (index < num_units) fetch(next, index, 0);
    while (index < num_units) {
        const Unit unit = make_unit<Traits>(g, index);
        Entries entries = next;
        const int next_index = claim();
        if (next_index < num_units) fetch(next, next_index, 0);
        const TileQueries own_queries = queries_of_rows(g, unit, 0, Traits::kRows);
        const int end = entries.count * subs;
        Load<Traits> load = {index, unit.kv_head, {}};
        int gathered = 0;  // sub-blocks of this load
        bool first_of_unit = true;
        for (int first = 0; first < end; first += 32) {
            if (first > 0) fetch(entries, index, first);
            const int i = first + lane;
            SharedSubBlock own = {};
            if (i < end) own = make_sub_block<Traits>(g, entries.entry, i - i / subs * subs);
            const bool wanted = own.num_keys > 0 && own.queries.overlap(own_queries);
            for (unsigned left = __ballot_sync(~0u, wanted); left != 0; left &= left - 1) {
                if (first_of_unit) pipeline.want_queries(u++, index);
                first_of_unit = false;
                gather_sub_block(load, gathered, of_lane(own, __ffs(left) - 1));
                if (++gathered < Traits::kSubBlocks) continue;
                loads.start(load);
                gathered = 0;
            }
        }
        if (gathered > 0) {
            // What is missing is a sub-block once more, without queries.
            SharedSubBlock none = load.blocks[0];
            none.queries = {{0, 0}};
            none.num_keys = 0;
            for (; gathered < Traits::kSubBlocks; ++gathered) gather_sub_block(load, gathered, none);
            loads.start(load);
        }
        index = next_index;
    }
    pipeline.want_queries(u, -1);
    loads.finish();
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

// The other loaders, kCheckers of them: hand over what has landed, with zeros for inf and NaN among the values.
template <typename Traits>
__device__ __forceinline__ void check_values(const Pipeline<Traits>& pipeline, int checker) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    constexpr int kThreads = Traits::kCheckers * 32;
    auto& state = pipeline.state;
    for (int n = 0;; ++n) {
        pipeline.wait(state.values_landed, n);
        const Load<Traits>& load = pipeline.load(n);
        if (load.unit < 0) return;
        // Rows behind the sequence's end came along.
        const auto in_sequence = [&](uint32_t offset) {
            const int row = offset / Tile::kRowBytes % Tile::kNumRows;
            return row % Traits::kSubBlockKeys < load.blocks[row / Traits::kSubBlockKeys].num_keys;
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
        check_values(pipeline, loader - 2);
    }
}

}  // namespace forward_shared
}  // namespace fsa
