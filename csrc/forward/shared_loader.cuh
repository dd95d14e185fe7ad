// The loaders of the forward shared kernel: the warps that bring Q of one unit after the other, and K and V of the sub-blocks
// it shares, through the buffers of a CTA. They are as far ahead of the others as there is shared memory.
#pragma once

#include "device/load_tile.cuh"
#include "forward/query_stage.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

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

// Load n has buffer n % kBuffers, the u-th unit of a CTA that has loads the queries' buffer u % kQueryBuffers; phase n / kBuffers of `full` and
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
        for (uint64_t& barrier : state.full) mbarrier_init(shared_address(&barrier), 32 * Traits::kLoaders);
        for (uint64_t& barrier : state.empty) mbarrier_init(shared_address(&barrier), 32 * Traits::kWarps);
        for (uint64_t& barrier : state.queries_empty) mbarrier_init(shared_address(&barrier), 32 * Traits::kWarps);
        for (uint64_t& barrier : state.claimed) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.claim_empty) mbarrier_init(shared_address(&barrier), 32 * Traits::kLoaders);
    }
    // Every thread arrives for itself: racecheck does not see what a lane that arrives for its warp knows of the others.
    __device__ __forceinline__ void arrive_full(int n) const {
        mbarrier_arrive(shared_address(&state.full[n % Traits::kBuffers]));
    }
    __device__ __forceinline__ void arrive_empty(int n) const {
        mbarrier_arrive(shared_address(&state.empty[n % Traits::kBuffers]));
    }
    __device__ __forceinline__ void arrive_queries_empty(int u) const {
        mbarrier_arrive(shared_address(&state.queries_empty[u % Traits::kQueryBuffers]));
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
        mbarrier_arrive(shared_address(&state.claim_empty[k % 2]));
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

__device__ __forceinline__ SharedSubBlock of_lane(SharedSubBlock block, int lane) {
    for (int* x : {&block.key_token, &block.num_keys, &block.visible_offset, &block.visible_end})
        *x = __shfl_sync(~0u, *x, lane);
    for (uint32_t& bits : block.queries.bits) bits = __shfl_sync(~0u, bits, lane);
    return block;
}

template <typename Traits>
__device__ __forceinline__ void gather_unit(
    const Pipeline<Traits>& pipeline, int u, int loader, const ForwardSharedParams& p, const Unit& unit) {
#pragma unroll 1
    for (int warp = loader; warp < Traits::kWarps; warp += Traits::kLoaders) {
        const UnitRow row = make_unit_row(p.geometry, unit, warp * 16 + threadIdx.x % 16);
        forward_main::gather_queries<typename Traits::T, Traits::kHeadDim>(
            pipeline.memory + pipeline.stage_offset(u, warp), p.geometry, p.q, unit.kv_head, row);
    }
}

template <typename Traits>
__device__ __forceinline__ void run_loader(const Pipeline<Traits>& pipeline, int loader, const ForwardSharedParams& p) {
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32, subs = g.block_size / Traits::kTileK;
    const int num_units = p.shared.num_tiles * g.num_heads * units_a_tile<Traits>(g);
    const bool leader = loader == 0 && lane == 0;
    int ahead = leader ? atomicAdd(p.shared.next, 1) : 0, claims = 0;
    const auto claim = [&] { return pipeline.claim(claims++, loader, ahead, p.shared.next); };
    const auto fetch = [&](Entries& entries, int index, int first) {
        const Unit unit = make_unit<Traits>(g, index);
        entries.fetch(p, unit.head, unit.tile, first, subs);
    };
    int n = 0, u = 0, index = claim();
    Entries next;
    if (index < num_units) fetch(next, index, 0);
    while (index < num_units) {
        const Unit unit = make_unit<Traits>(g, index);
        Entries entries = next;
        const int next_index = claim();
        if (next_index < num_units) fetch(next, next_index, 0);
        const TileQueries own_queries = queries_of_rows(g, unit, 0, Traits::kRows);
        const int end = entries.count * subs;
        bool first_of_unit = true;
        for (int first = 0; first < end; first += 32) {
            if (first > 0) fetch(entries, index, first);
            const int i = first + lane;
            SharedSubBlock own = {};
            if (i < end) own = make_sub_block<Traits>(g, entries.entry, i - i / subs * subs);
            const bool wanted = own.num_keys > 0 && own.queries.overlap(own_queries);
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
        if (!first_of_unit) ++u;
        index = next_index;
    }
    if (n > 0) finish_load<Traits, 0>(pipeline, n - 1, loader, true);
    pipeline.wait_empty(n);
    if (leader) pipeline.load(n).unit = -1;
    pipeline.arrive_full(n);
}

}  // namespace forward_shared
}  // namespace fsa
