// The forward main kernel for Hopper: products of warpgroups, whole rows in and out.
//
// K and V of a sub-block lie in shared memory for all warpgroups of the CTA; there is no barrier in the loop over tiles.
// A warp's 16 query rows come by cp.async, a tile ahead, and go to registers as A fragments; its rows of O leave through
// the same shared memory (forward/query_stage.cuh).
#pragma once

#include "device/load_tile.cuh"
#include "device/work_item.cuh"
#include "forward/main.h"
#include "forward/main_sm90_traits.h"
#include "forward/query_stage.cuh"
#include "forward/query_tile.cuh"
#include "host/launch_main.h"

namespace fsa {
namespace forward_main {

// What a CTA knows of its current work item, and the one after it.
template <typename Traits>
struct ItemAndNext : ItemState<Traits> {
    WorkItem next;
};

// K and V of the sub-block, asynchronously; the caller commits. All threads of the CTA take part.
template <typename Traits>
__device__ __forceinline__ void load_kv_block(
    uint32_t k_tile, uint32_t v_tile, const WorkItem& item, const ForwardMainParams& p) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    constexpr int kTileK = Traits::kTileK, kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
    const auto source = [&](const RowTensor& t) -> TileSource<T> {
        return {
            row_pointer<T>(t, item.key_token, item.kv_head), t.token_stride, item.num_keys, p.geometry.head_dim / 8};
    };
    load_tile_async<T, kTileK, kHeadDim, kThreads, Tile>(k_tile, source(p.k));
    load_tile_async<T, kTileK, kHeadDim, kThreads, Tile>(v_tile, source(p.v));
}

// What their values ask of the output; waits for all copies of the CTA.
template <typename Traits>
__device__ __forceinline__ void finish_kv_block(uint32_t v_tile, ItemState<Traits>& state, const ForwardMainParams& p) {
    cp_async_wait<0>();
    const TileMagnitude values = zero_nonfinite_in_tile<
        typename Traits::T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads, typename Traits::Tile>(v_tile);
    fence_async_proxy();
    publish_value_scale<Traits>(state, values, p);
}

// O = P V to the warp's stage, kColumns at a time.
template <typename Traits>
__device__ __forceinline__ void compute_pv_sm90(const Probs<Traits>& probs, uint32_t v_tile, uint32_t stage) {
    constexpr int kColumns = Traits::kColumns;
#pragma unroll
    for (int first = 0; first < Traits::kHeadDim; first += kColumns) {
        float o[kColumns / 2];
        wgmma_fence();
        compute_pv_columns<Traits, kColumns>(o, probs, v_tile, first, false);
        wgmma_commit();
        wgmma_wait<0>();
        output_to_stage<__half, Traits::kHeadDim, kColumns>(stage, o, first);
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    forward_main_sm90(const __grid_constant__ ForwardMainParams p) {
    await_kernel_before();
    using Stage = typename Traits::Stage;
    static_assert(sizeof(ItemAndNext<Traits>) <= Traits::kStateBytes);
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    const uint32_t k_tile = shared_address(memory), v_tile = k_tile + Traits::Tile::kBytes;
    auto& state = *reinterpret_cast<ItemAndNext<Traits>*>(memory + Traits::kSharedBytes - Traits::kStateBytes);
    const Geometry& g = p.geometry;
    const WorkItem& item = state.queue.item;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_of_warpgroup = warp / 4 * Traits::kTileQ;
    const int tile_row = warp * 16 + lane % 16;  // whose description this lane keeps
    constexpr int kHeadDim = Traits::kHeadDim, kStep = Traits::kWarpgroups * Traits::kTileQ;
    const uint32_t stages = v_tile + Traits::Tile::kBytes + warp * Traits::kStages * Stage::kBytes;
    uint32_t stage = 0;  // offset: of this tile; the other one is the next tile's

    // The next item is made as soon as its entry is there, not between two items, where all threads would wait for it.
    auto receive_next = [&] { receive_work_item(state.next, state.queue, g, p.plan, Traits::kTileK); };
    request_work_item(state.queue, g, p.plan, claim_work_item(p.plan));
    receive_next();
    while (take_work_item(state.queue, state.next)) {
        // Edges are fetched two tiles ahead, query rows one.
        auto edge_of = [&](int first_row) { return load_edge(g, p.plan, item, first_row + tile_row); };
        auto row_of = [&](int first_row, int edge) { return make_query_row(g, item, first_row + tile_row, edge); };
        auto gather = [&](uint32_t to, const QueryRow& row) {
            __syncwarp();  // O has left the stage
            gather_queries<typename Traits::T, kHeadDim>(stages + to, g, p.q, item.kv_head, row);
            cp_async_commit();
        };
        const int claimed = claim_work_item(p.plan), first_edge = edge_of(0);
        int next_edge = edge_of(kStep);
        load_kv_block<Traits>(k_tile, v_tile, item, p);
        request_work_item(state.queue, g, p.plan, claimed);
        QueryRow row = row_of(0, first_edge);
        gather(stage, row);
        finish_kv_block<Traits>(v_tile, state, p);
        receive_next();

        for (int first_row = 0; first_row + first_of_warpgroup < item.num_rows; first_row += kStep) {
            Scores<Traits> s;
            Probs<Traits> probs;
            cp_async_wait<0>();
            __syncwarp();
            compute_scores_sm90<Traits>(s, stages + stage, k_tile);
            const QueryRow next_row = row_of(first_row + kStep, next_edge);
            if (first_row + kStep + first_of_warpgroup < item.num_rows) gather(Stage::kBytes - stage, next_row);
            next_edge = edge_of(first_row + 2 * kStep);
            mask_invisible<Traits>(s, row);
            // L2 keeps log-sum-exps until those of a query's other blocks have come: memory takes whole sectors of eight.
            normalise_and_store_lse<Traits>(probs, s, p, state, row, [](float* address, float lse) {
                store_global_4(address, lse, evict_last_policy());
            });
            compute_pv_sm90<Traits>(probs, v_tile, stages + stage);
            if (state.nonfinite_values) {
                __syncwarp();
                auto* o = reinterpret_cast<__half*>(memory + (stages + stage - k_tile));
                restore_nonfinite_values<Traits>(
                    row_pointer<typename Traits::T>(p.v, item.key_token, item.kv_head), p.v.token_stride, item.num_keys,
                    g.head_dim, row,
                    [&](int r, int, int column) { return o + Stage::Layout::offset(r, column / 8) / 2; });
            }
            store_partials<kHeadDim>(
                stages + stage, p.o_partial + state.first_partial_row * g.head_dim, g.head_dim, row);
            row = next_row;
            stage = Stage::kBytes - stage;
        }
    }
}

}  // namespace forward_main

template <typename T, int kHeadDim, int kTileK>
void launch_forward_main_sm90(const ForwardMainParams& p, cudaStream_t stream) {
    using Traits = ForwardMainSm90Traits<T, kHeadDim, kTileK>;
    launch_main<Traits>("forward_main_sm90", forward_main::forward_main_sm90<Traits>, p, stream);
}

}  // namespace fsa
