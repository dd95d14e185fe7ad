// The forward main kernel on warp-level MMA. One source serves every GPU from sm_80 on.
//
// A CTA keeps K and V of a sub-block in shared memory; each of its warps takes tiles of query rows on its own, with
// no barrier in the loop. Neither Q nor O passes through shared memory: query rows go from global memory straight
// into A fragments (the sum over head_dim runs in a permuted order, the same for K), and V is stored so that a lane's
// accumulators are 8 neighbouring columns, one 16-byte store. The next tile's rows are requested as soon as the
// scores of this one have used up the fragments.
#pragma once

#include "device/layout.h"
#include "device/load_tile.cuh"
#include "device/ptx.cuh"
#include "device/work_item.cuh"
#include "forward/main.h"
#include "forward/main_traits.h"
#include "forward/query_tile.cuh"
#include "host/launch_main.h"

namespace fsa {
namespace forward_main {

template <typename Traits>
struct SharedTiles {
    uint32_t k, v;  // shared-memory addresses
    ItemState<Traits>* state;
};

template <typename Traits>
__device__ __forceinline__ void compute_scores(Scores<Traits>& s, const QueryFragments<Traits>& q, uint32_t k_tile) {
    using Tile = SwizzledTile<Traits::kHeadDim * 2>;
    const int lane = threadIdx.x % 32;
    const uint32_t lane_chunk[2] = {
        k_tile + Tile::offset(lane / 4, lane % 4), k_tile + Tile::offset(lane / 4, lane % 4 + 4)};
#pragma unroll
    for (int m = 0; m < Traits::kMmaRows; ++m)
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
#pragma unroll
    for (int j = 0; j < Traits::kHeadDim / 32; ++j) {
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n) {
            const uint4 b = load_shared_16(lane_chunk[j % 2] + j / 2 * 128 + n * 8 * Traits::kHeadDim * 2);
#pragma unroll
            for (int m = 0; m < Traits::kMmaRows; ++m) {
                const uint4 low = q[2 * m][j], high = q[2 * m + 1][j];
                mma_m16n8k16<typename Traits::T>(s[m][n], {low.x, high.x, low.y, high.y}, b.x, b.y);
            }
#pragma unroll
            for (int m = 0; m < Traits::kMmaRows; ++m) {
                const uint4 low = q[2 * m][j], high = q[2 * m + 1][j];
                mma_m16n8k16<typename Traits::T>(s[m][n], {low.z, high.z, low.w, high.w}, b.z, b.w);
            }
        }
    }
}

// O = P V, 32 columns at a time, each stored as soon as it is done.
template <typename Traits>
__device__ __forceinline__ void compute_pv_and_store(
    const Probs<Traits>& probs, uint32_t v_tile, const ForwardMainParams& p, const ItemState<Traits>& state,
    const QueryRow& row) {
    using Tile = SwizzledTile<Traits::kHeadDim * 2>;
    const int lane = threadIdx.x % 32, head_dim = p.geometry.head_dim;
    __half* o_partial = p.o_partial + state.first_partial_row * head_dim;
    int partial_row[kLaneRows<Traits>];
#pragma unroll
    for (int i = 0; i < kLaneRows<Traits>; ++i) partial_row[i] = __shfl_sync(~0u, row.partial_row, 8 * i + lane / 4);
    // lane_chunk[parity of the group][pair of n8 tiles]
    const int lane_row = lane % 16, lane_pair = lane / 16;
    const uint32_t lane_chunk[2][2] = {
        {v_tile + Tile::offset(lane_row, lane_pair), v_tile + Tile::offset(lane_row, lane_pair + 2)},
        {v_tile + Tile::offset(lane_row, lane_pair + 4), v_tile + Tile::offset(lane_row, lane_pair + 6)},
    };
#pragma unroll
    for (int group = 0; group < Traits::kHeadDim / 32; ++group) {
        float o[Traits::kMmaRows][4][4] = {};
#pragma unroll
        for (int k = 0; k < Traits::kTileK / 16; ++k) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, lane_chunk[group % 2][pair] + group / 2 * 128 + k * 16 * Traits::kHeadDim * 2);
#pragma unroll
                for (int m = 0; m < Traits::kMmaRows; ++m) {
                    const uint32_t a[4] = {
                        probs[m][2 * k][0], probs[m][2 * k][1], probs[m][2 * k + 1][0], probs[m][2 * k + 1][1]};
                    mma_m16n8k16<typename Traits::T>(o[m][2 * pair], a, b[0], b[1]);
                    mma_m16n8k16<typename Traits::T>(o[m][2 * pair + 1], a, b[2], b[3]);
                }
            }
        }
        store_partial<Traits>(o_partial, partial_row, o, 32 * group, head_dim);
    }
}

// K and V of the sub-block, and what their values ask of the output. All threads of the CTA take part.
template <typename Traits>
__device__ __forceinline__ void load_kv_block(const SharedTiles<Traits>& shared, const ForwardMainParams& p) {
    using T = typename Traits::T;
    const WorkItem& item = shared.state->queue.item;
    const int num_chunks = p.geometry.head_dim / 8;
    load_tile_async<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads>(
        shared.k, {row_pointer<T>(p.k, item.key_token, item.kv_head), p.k.token_stride, item.num_keys, num_chunks});
    cp_async_commit();
    const TileMagnitude values = load_tile_interleaved<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads>(
        shared.v, {row_pointer<T>(p.v, item.key_token, item.kv_head), p.v.token_stride, item.num_keys, num_chunks},
        [](int) {});
    cp_async_wait<0>();
    publish_value_scale<Traits>(*shared.state, values, p);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    forward_main(const __grid_constant__ ForwardMainParams p) {
    await_kernel_before();
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    const uint32_t k_tile = shared_address(memory);
    const SharedTiles<Traits> shared = {
        k_tile, k_tile + Traits::kTileBytes, reinterpret_cast<ItemState<Traits>*>(memory + 2 * Traits::kTileBytes)};
    static_assert(sizeof(ItemState<Traits>) <= Traits::kStateBytes);
    const Geometry& g = p.geometry;
    const int warp = threadIdx.x / 32, tile_lane = threadIdx.x % Traits::kTileQ;

    const WorkItem& item = shared.state->queue.item;

    request_work_item(shared.state->queue, g, p.plan, claim_work_item(p.plan));
    while (fetch_work_item(shared.state->queue, g, p.plan, Traits::kTileK)) {
        const int claimed = claim_work_item(p.plan);
        load_kv_block(shared, p);
        request_work_item(shared.state->queue, g, p.plan, claimed);

        // A lane keeps the description of one row of its warp's tile; edges are fetched two tiles ahead, query rows
        // one.
        auto edge_of = [&](int tile) { return load_edge(g, p.plan, item, tile * Traits::kTileQ + tile_lane); };
        auto row_of = [&](int tile, int edge) {
            return make_query_row(g, item, tile * Traits::kTileQ + tile_lane, edge);
        };
        QueryFragments<Traits> q;
        QueryRow row = row_of(warp, edge_of(warp));
        load_queries<Traits>(q, p, item, row);
        int next_edge = edge_of(warp + Traits::kWarps);
        for (int tile = warp; tile * Traits::kTileQ < item.num_rows; tile += Traits::kWarps) {
            Scores<Traits> s;
            Probs<Traits> probs;
            compute_scores<Traits>(s, q, shared.k);
            const QueryRow next_row = row_of(tile + Traits::kWarps, next_edge);
            load_queries<Traits>(q, p, item, next_row);
            next_edge = edge_of(tile + 2 * Traits::kWarps);
            mask_invisible<Traits>(s, row);
            normalise_and_store_lse<Traits>(
                probs, s, p, *shared.state, row, [](float* address, float lse) { *address = lse; });
            compute_pv_and_store<Traits>(probs, shared.v, p, *shared.state, row);
            if (shared.state->nonfinite_values) {
                __half* o_partial = p.o_partial + shared.state->first_partial_row * g.head_dim;
                restore_nonfinite_values<Traits>(
                    row_pointer<typename Traits::T>(p.v, item.key_token, item.kv_head), p.v.token_stride, item.num_keys,
                    g.head_dim, row, [&](int, int partial_row, int column) {
                        return o_partial + static_cast<int64_t>(partial_row) * g.head_dim + column;
                    });
            }
            row = next_row;
        }
    }
}

}  // namespace forward_main

template <typename T, int kHeadDim, int kTileK>
void launch_forward_main(const ForwardMainParams& p, cudaStream_t stream) {
    using Traits = ForwardMainTraits<T, kHeadDim, kTileK>;
    launch_main<Traits>("forward_main", forward_main::forward_main<Traits>, p, stream);
}

}  // namespace fsa
