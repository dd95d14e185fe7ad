// The loaders of the block scores: warps that bring the keys of one unit after the other, and the queries and normalisers of
// its items, through the buffers of a CTA.
#pragma once

#include "device/ptx.cuh"
#include "device/softmax.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "selection/score_units.cuh"

namespace fsa {
namespace block_scores {

struct Sm90Params : BlockScoresParams {
    TensorMap q_map, k_map;
};

// Item i of a CTA (a head of a tile of queries) has the queries' buffer i % kQueryBuffers.
template <typename Traits>
struct Pipeline {
    struct State {
        uint64_t keys_full[Traits::kWarpgroups], keys_empty[Traits::kWarpgroups];  // phase u: of unit u
        uint64_t queries_full[Traits::kQueryBuffers], queries_empty[Traits::kQueryBuffers];
        uint64_t turns
            [Traits::kWarpgroups];  // whose phase i ends when it is a warpgroup's turn to begin the products of item i
    };
    static_assert(sizeof(State) <= Traits::kStateBytes);

    State& state;
    unsigned char* memory;

    static __device__ __forceinline__ unsigned buffer(unsigned i) {
        return i % Traits::kQueryBuffers;
    }
    static __device__ __forceinline__ unsigned parity(unsigned i) {
        return i / Traits::kQueryBuffers % 2;
    }
    __device__ __forceinline__ uint32_t keys(int warpgroup) const {
        return shared_address(memory) + warpgroup * Traits::KeyTile::kBytes;
    }
    __device__ __forceinline__ uint32_t queries(unsigned i) const {
        return shared_address(memory) + Traits::kQueriesOffset + buffer(i) * Traits::QueryTile::kBytes;
    }

    // Of the rows of a tile: what to subtract from their scores, log2.
    __device__ __forceinline__ float* normalisers(unsigned i) const {
        return reinterpret_cast<float*>(memory + Traits::kNormalisersOffset) + buffer(i) * Traits::kTileQ;
    }

    // One thread; a barrier of the CTA follows.
    __device__ __forceinline__ void init() const {
        for (uint64_t& barrier : state.keys_full) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.keys_empty) mbarrier_init(shared_address(&barrier), 128);
        for (uint64_t& barrier : state.queries_full) mbarrier_init(shared_address(&barrier), 1 + 32);
        for (uint64_t& barrier : state.queries_empty) mbarrier_init(shared_address(&barrier), Traits::kConsumers);
        for (uint64_t& barrier : state.turns) mbarrier_init(shared_address(&barrier), 4);  // warps of the one before
        fence_async_proxy();  // the copy engine arrives, too
    }
    __device__ __forceinline__ uint32_t keys_full(int warpgroup) const {
        return shared_address(&state.keys_full[warpgroup]);
    }
    __device__ __forceinline__ uint32_t queries_full(unsigned i) const {
        return shared_address(&state.queries_full[buffer(i)]);
    }
    __device__ __forceinline__ void wait_keys(int warpgroup, unsigned u) const {
        mbarrier_wait(keys_full(warpgroup), u % 2);
    }
    __device__ __forceinline__ void wait_queries(unsigned i) const {
        mbarrier_wait(queries_full(i), parity(i));
    }
    __device__ __forceinline__ void arrive_keys_empty(int warpgroup) const {
        mbarrier_arrive(shared_address(&state.keys_empty[warpgroup]));
    }
    __device__ __forceinline__ void arrive_queries_empty(unsigned i) const {
        mbarrier_arrive(shared_address(&state.queries_empty[buffer(i)]));
    }
    // The buffers that unit u, item i are to have; free at the beginning.
    __device__ __forceinline__ void wait_keys_empty(int warpgroup, unsigned u) const {
        if (u >= 1) mbarrier_wait(shared_address(&state.keys_empty[warpgroup]), (u - 1) % 2);
    }
    __device__ __forceinline__ void wait_queries_empty(unsigned i) const {
        constexpr unsigned kBuffers = Traits::kQueryBuffers;
        if (i >= kBuffers) mbarrier_wait(shared_address(&state.queries_empty[buffer(i)]), parity(i - kBuffers));
    }

    // The warpgroups have their products in turn: together they would have them at a fraction of the speed each, and then
    // their exponentials, while the tensor cores rest. No data depends on it. The last one passes once before its first turn.
    __device__ __forceinline__ void await_turn(int warpgroup, unsigned i) const {
        mbarrier_wait(shared_address(&state.turns[warpgroup]), i % 2);
    }
    __device__ __forceinline__ void pass_turn(int warpgroup) const {
        const int next = warpgroup == Traits::kWarpgroups - 1 ? 0 : warpgroup + 1;
        __syncwarp();  // every lane has seen its turn
        if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&state.turns[next]));
    }
};

// Loads a tile of rows of one head from `row` on, panel by panel.
template <typename Tile, int kHeadDim>
__device__ __forceinline__ void load_tile(uint32_t tile, const TensorMap& map, uint32_t full, int head, int row) {
#pragma unroll
    for (int panel = 0; panel < kHeadDim / Tile::kPanelColumns; ++panel)
        tma_load_3d(tile + panel * Tile::kPanelBytes, map, full, panel * Tile::kPanelColumns, head, row);
}

// Calls f(unit, first query, head) for every item of a unit.
template <typename Traits, typename F>
__device__ __forceinline__ void for_each_item(const BlockScoresParams& p, const Unit& unit, const F& f) {
    for (int query = unit.first_query; query < unit.end_query; query += Traits::kTileQ)
        for (int head = 0; head < p.group_size; ++head) f(query, unit.kv_head * p.group_size + head);
}

// The loaders. Rows of other sequences come along, and zeros from outside of the tensors: their products are not looked at.
// One thread:
template <typename Traits>
__device__ __forceinline__ void load_keys(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    unsigned u = 0;
    for_each_unit<Traits>(p, [&](const Unit& unit) {
        for (int warpgroup = 0; warpgroup < Traits::kWarpgroups; ++warpgroup) {
            const uint32_t full = pipeline.keys_full(warpgroup);
            pipeline.wait_keys_empty(warpgroup, u);
            mbarrier_arrive_expect(full, Traits::KeyTile::kBytes);
            load_tile<typename Traits::KeyTile, Traits::kHeadDim>(
                pipeline.keys(warpgroup), p.k_map, full, unit.kv_head,
                unit.bounds.key_begin + first_window<Traits>(p, unit, warpgroup));
        }
        ++u;
    });
}

// One thread:
template <typename Traits>
__device__ __forceinline__ void load_queries(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    unsigned i = 0;
    for_each_unit<Traits>(p, [&](const Unit& unit) {
        for_each_item<Traits>(p, unit, [&](int query, int head) {
            pipeline.wait_queries_empty(i);
            mbarrier_arrive_expect(pipeline.queries_full(i), Traits::QueryTile::kBytes);
            load_tile<typename Traits::QueryTile, Traits::kHeadDim>(
                pipeline.queries(i), p.q_map, pipeline.queries_full(i), head, query);
            ++i;
        });
    });
}

// A warp: log-sum-exps, those of an item on their way while the ones before are put down. Infinite, so that nothing weighs
// anything, for queries that see no window.
template <typename Traits>
__device__ __forceinline__ void load_normalisers(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    constexpr int kRows = Traits::kTileQ / 32;
    const int lane = threadIdx.x % 32;
    unsigned i = 0;  // the item after the one whose are on their way
    float lse[kRows];
    const auto put_down = [&] {
        pipeline.wait_queries_empty(i - 1);
        for (int x = 0; x < kRows; ++x)
            pipeline.normalisers(i - 1)[x * 32 + lane] = lse[x] == -INFINITY ? INFINITY : lse[x] * kLog2E;
        mbarrier_arrive(pipeline.queries_full(i - 1));
    };
    for_each_unit<Traits>(p, [&](const Unit& unit) {
        for_each_item<Traits>(p, unit, [&](int query, int head) {
            const float* of_head = p.lse + static_cast<int64_t>(head) * p.sequences.total_q;
            float next[kRows];
            for (int x = 0; x < kRows; ++x) next[x] = __ldg(of_head + min(query + x * 32 + lane, unit.end_query - 1));
            if (i > 0) put_down();
            for (int x = 0; x < kRows; ++x) lse[x] = next[x];
            ++i;
        });
    });
    if (i > 0) put_down();
}

template <typename Traits>
__device__ __forceinline__ void run_loader(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    const int loader = (static_cast<int>(threadIdx.x) - Traits::kConsumers) / 32, lane = threadIdx.x % 32;
    if (loader == 0 && lane == 0) load_keys<Traits>(pipeline, p);
    if (loader == 1 && lane == 0) load_queries<Traits>(pipeline, p);
    if (loader == 2) load_normalisers<Traits>(pipeline, p);
}

}  // namespace block_scores
}  // namespace fsa
