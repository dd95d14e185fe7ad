// The forward main kernel for Hopper: products of warpgroups, whole rows in and out.
//
// K and V of a sub-block lie in shared memory for all warpgroups of the CTA; there is no barrier in the loop over tiles.
// A warp's 16 query rows come by cp.async, a tile ahead, and go to registers as A fragments; its rows of O leave through
// the same shared memory. Every request to L2 is thus for whole lines: fragments loaded and stored directly come in pieces
// of 64 bytes, and L2 ran out of requests first (docs/performance.md).
#pragma once

#include "device/load_tile.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "device/work_item.cuh"
#include "forward/main.h"
#include "forward/main_sm90_traits.h"
#include "forward/query_tile.cuh"
#include "launch.h"

namespace fsa {
namespace forward_main {

// K and V of the sub-block, and what their values ask of the output. All threads of the CTA take part.
template <typename Traits>
__device__ __forceinline__ void load_kv_block(
    uint32_t k_tile, uint32_t v_tile, ItemState<Traits>& state, const ForwardMainParams& p) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    constexpr int kTileK = Traits::kTileK, kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
    const WorkItem& item = state.item;
    const auto source = [&](const RowTensor& t) -> TileSource<T> {
        return {
            row_pointer<T>(t, item.key_token, item.kv_head), t.token_stride, item.num_keys, p.geometry.head_dim / 8};
    };
    load_tile_async<T, kTileK, kHeadDim, kThreads, Tile>(k_tile, source(p.k));
    load_tile_async<T, kTileK, kHeadDim, kThreads, Tile>(v_tile, source(p.v));
    cp_async_commit();
    cp_async_wait<0>();
    const TileMagnitude values = zero_nonfinite_in_tile<T, kTileK, kHeadDim, kThreads, Tile>(v_tile);
    fence_async_proxy();
    publish_value_scale<Traits>(state, values, p);
}

// The warp's 16 query rows, asynchronously. Rows that do not exist repeat the last one.
template <typename Traits>
__device__ __forceinline__ void gather_queries(
    uint32_t stage, const ForwardMainParams& p, const WorkItem& item, const QueryRow& row) {
    using T = typename Traits::T;
    constexpr int kChunks = Traits::kHeadDim / 8;
    const int lane = threadIdx.x % 32, num_chunks = p.geometry.head_dim / 8;
    const T* own = row_pointer<T>(p.q, row.query, item.kv_head * p.geometry.group_size + row.group_head);
#pragma unroll
    for (int i = 0; i < 16 * kChunks / 32; ++i) {
        const int tile_row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
        const uint64_t address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(own), tile_row);
        const bool valid = chunk < num_chunks;
        cp_async_16(
            stage + tile_row * Traits::kRowPitch + chunk * 16,
            reinterpret_cast<const T*>(address) + (valid ? chunk * 8 : 0), valid);
    }
    cp_async_commit();
}

// Where lane i points ldmatrix and stmatrix to in a stage: 16 rows, two chunks.
template <typename Traits>
__device__ __forceinline__ uint32_t lane_chunk(uint32_t stage) {
    const int lane = threadIdx.x % 32;
    return stage + lane % 16 * Traits::kRowPitch + lane / 16 * 16;
}

template <typename Traits>
__device__ __forceinline__ void compute_scores_sm90(Scores<Traits>& s, uint32_t stage, uint32_t k_tile) {
    constexpr int kSteps = Traits::kHeadDim / 16;
    auto& accumulators = reinterpret_cast<float (&)[Traits::kTileK / 2]>(s);
    uint32_t q[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ldmatrix_x4(q[step], lane_chunk<Traits>(stage) + step * 32);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        wgmma_rs<typename Traits::T, Major::kSum>(
            accumulators, q[step], Traits::Tile::along_columns(k_tile, step), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
}

// O = P V to the warp's stage, kColumns at a time.
template <typename Traits>
__device__ __forceinline__ void compute_pv_sm90(const Probs<Traits>& probs, uint32_t v_tile, uint32_t stage) {
    using Tile = typename Traits::Tile;
    using Partial = HalfType<__half>;
#pragma unroll
    for (int pass = 0; pass < Traits::kHeadDim / Traits::kColumns; ++pass) {
        float o[Traits::kColumns / 2];
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kTileK / 16; ++step) {
            const uint32_t a[4] = {
                probs[0][2 * step][0], probs[0][2 * step][1], probs[0][2 * step + 1][0], probs[0][2 * step + 1][1]};
            wgmma_rs<typename Traits::T, Major::kOuter>(
                o, a, Tile::along_rows(v_tile, step, pass * Traits::kColumns / Tile::kPanelColumns), step > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < Traits::kColumns / 16; ++i) {
            const float* const x = o + 8 * i;
            const uint32_t words[4] = {
                Partial::pack(x[0], x[1]), Partial::pack(x[2], x[3]), Partial::pack(x[4], x[5]),
                Partial::pack(x[6], x[7])};
            stmatrix_x4(lane_chunk<Traits>(stage) + (pass * Traits::kColumns / 16 + i) * 32, words);
        }
    }
}

// Whole rows from the stage to memory.
template <typename Traits>
__device__ __forceinline__ void store_partials(
    uint32_t stage, const ForwardMainParams& p, const ItemState<Traits>& state, const QueryRow& row) {
    constexpr int kChunks = Traits::kHeadDim / 8;
    const int lane = threadIdx.x % 32, head_dim = p.geometry.head_dim;
    __half* o_partial = p.o_partial + state.first_partial_row * head_dim;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * kChunks / 32; ++i) {
        const int tile_row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
        const int partial_row = __shfl_sync(~0u, row.partial_row, tile_row);
        const uint4 x = load_shared_16(stage + tile_row * Traits::kRowPitch + chunk * 16);
        store_global_16(
            o_partial + static_cast<int64_t>(partial_row) * head_dim + chunk * 8, x,
            partial_row >= 0 && chunk * 8 < head_dim);
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    forward_main_sm90(const __grid_constant__ ForwardMainParams p) {
    static_assert(sizeof(ItemState<Traits>) <= Traits::kStateBytes);
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    const uint32_t k_tile = shared_address(memory), v_tile = k_tile + Traits::Tile::kBytes;
    auto& state = *reinterpret_cast<ItemState<Traits>*>(memory + Traits::kSharedBytes - Traits::kStateBytes);
    const Geometry& g = p.geometry;
    const WorkItem& item = state.item;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_of_warpgroup = warp / 4 * Traits::kTileQ;
    const int tile_row = warp * 16 + lane % 16;  // whose description this lane keeps
    constexpr int kStep = Traits::kWarpgroups * Traits::kTileQ;
    const uint32_t stages = v_tile + Traits::Tile::kBytes + warp * Traits::kStages * Traits::kStageBytes;
    uint32_t stage = 0;  // offset: of this tile; the other one is the next tile's

    int claimed = claim_work_item(p.plan);
    while (fetch_work_item(&state.item, g, p.plan, Traits::kTileK, claimed)) {
        // Edges are fetched two tiles ahead, query rows one.
        auto edge_of = [&](int first_row) { return load_edge(g, p.plan, item, first_row + tile_row); };
        auto row_of = [&](int first_row, int edge) { return make_query_row(g, item, first_row + tile_row, edge); };
        auto gather = [&](uint32_t to, const QueryRow& row) {
            __syncwarp();  // O has left the stage
            gather_queries<Traits>(stages + to, p, item, row);
        };
        QueryRow row = row_of(0, edge_of(0));
        gather(stage, row);
        int next_edge = edge_of(kStep);
        load_kv_block<Traits>(k_tile, v_tile, state, p);

        for (int first_row = 0; first_row + first_of_warpgroup < item.num_rows; first_row += kStep) {
            Scores<Traits> s;
            Probs<Traits> probs;
            cp_async_wait<0>();
            __syncwarp();
            compute_scores_sm90<Traits>(s, stages + stage, k_tile);
            const QueryRow next_row = row_of(first_row + kStep, next_edge);
            if (first_row + kStep + first_of_warpgroup < item.num_rows) gather(Traits::kStageBytes - stage, next_row);
            next_edge = edge_of(first_row + 2 * kStep);
            mask_invisible<Traits>(s, row);
            normalise_and_store_lse<Traits>(probs, s, p, state, row);
            compute_pv_sm90<Traits>(probs, v_tile, stages + stage);
            if (state.nonfinite_values) {
                __syncwarp();
                auto* o = reinterpret_cast<__half*>(memory + (stages + stage - k_tile));
                restore_nonfinite_values<Traits>(
                    p, item, row, [&](int r, int) { return o + r * Traits::kRowPitch / 2; });
            }
            store_partials<Traits>(stages + stage, p, state, row);
            row = next_row;
            stage = Traits::kStageBytes - stage;
        }
    }
}

}  // namespace forward_main

template <typename T, int kHeadDim, int kTileK>
void launch_forward_main_sm90(const ForwardMainParams& p, cudaStream_t stream) {
    using Traits = ForwardMainSm90Traits<T, kHeadDim, kTileK>;
    const auto kernel = forward_main::forward_main_sm90<Traits>;
    const int ctas = min(p.plan.max_items * p.geometry.subs, sm_count() * Traits::kMinCtas);
    launch("forward_main_sm90", kernel, {dim3(ctas), Traits::kThreads, Traits::kSharedBytes}, p, stream);
}

}  // namespace fsa
