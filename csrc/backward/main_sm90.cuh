// The backward main kernel for Hopper: products of warpgroups, otherwise the mathematics of backward/main.cuh.
//
// A CTA is one warpgroup. It keeps K and V of a sub-block in shared memory, its dK and dV in registers, and walks tiles
// of query rows; Q and dO of the next tile arrive meanwhile. Scores are computed transposed (keys are rows), so that
// the accumulators of P^T and dS^T are, packed, the A fragments of dV += P^T dO and dK += dS^T Q. Only dQ = dS K reads
// dS^T from shared memory. K is interleaved (layout.h): a lane's dQ accumulators are 8 neighbouring columns, and its
// 16-byte loads of K are A fragments of S^T = K Q^T in natural order.
#pragma once

#include "backward/key_gradients.cuh"
#include "backward/main.h"
#include "backward/main_sm90_traits.h"
#include "backward/query_rows_sm90.cuh"
#include "device/convert.cuh"
#include "device/load_tile.cuh"
#include "device/ptx.cuh"
#include "device/softmax.cuh"
#include "device/wgmma.cuh"
#include "device/work_item.cuh"
#include "host/launch_main.h"

namespace fsa {
namespace backward_main_sm90 {

using namespace backward_main;

// K and V of the sub-block and what else depends on the item alone, asynchronously. All threads of the CTA take part.
template <typename Traits>
__device__ __forceinline__ void load_kv_block(const SharedTiles<Traits>& shared, const BackwardMainParams& p) {
    using T = typename Traits::T;
    const WorkItem& item = shared.state->queue.item;
    const auto source = [&](const RowTensor& t) -> TileSource<T> {
        return {
            row_pointer<T>(t, item.key_token, item.kv_head), t.token_stride, item.num_keys, p.geometry.head_dim / 8};
    };
    load_tile_async<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads, typename Traits::PermutedKeys>(
        shared.k, source(p.k));
    load_tile_async<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads, typename Traits::KeyTile>(
        shared.v, source(p.v));
    load_cell_edges(shared.state->cell_edges, p.plan, item);
    if (threadIdx.x < Traits::kTileK) shared.poison[threadIdx.x] = 0.f;
}

// Interleaves K, which has arrived. A barrier stands between load_kv_block and this.
template <typename Traits>
__device__ __forceinline__ void finish_kv_block(const SharedTiles<Traits>& shared, const BackwardMainParams& p) {
    using T = typename Traits::T;
    __syncwarp();
    const TileMagnitude keys =
        interleave_tile<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads, typename Traits::PermutedKeys>(
            shared.k, [&](int row) { shared.poison[row] = NAN; });
    const int nonfinite = __syncthreads_or(keys.nonfinite);
    if (threadIdx.x == 0) {  // seen behind the barrier before the first tile
        shared.state->nonfinite_keys = nonfinite;
        shared.state->partial =
            static_cast<unsigned char*>(p.dq_partial) +
            first_partial_row(p.geometry, shared.state->queue.item.head) * p.geometry.head_dim * sizeof(T);
    }
}

// 16 keys a warp x 64 queries, transposed scores: element 4n + i of a lane is query 8n + 2 (lane % 4) + i % 2 and key
// lane / 4 + i / 2 * 8 of its warp.
template <typename Traits>
using Scores = float[Traits::kTileQ / 2];

// The same as A fragments: [step of 16 queries]
template <typename Traits>
using ScoreFragments = uint32_t[Traits::kTileQ / 16][4];

// 16 keys a warp x kHeadDim
template <typename Traits>
using KeyGradient = float[Traits::kHeadDim / 8][4];

// 16 queries a warp x kHeadDim, in groups of 32 columns
template <typename Traits>
using QueryGradient = float[Traits::kHeadDim / 32][4][4];

// K as A fragments: [step of 16 columns]
template <typename Traits>
using KeyFragments = uint32_t[Traits::kHeadDim / 16][4];

template <typename Traits>
__device__ __forceinline__ void load_key_fragments(KeyFragments<Traits>& fragments, uint32_t k_tile) {
    using Tile = typename Traits::KeyTile;
    constexpr int kGroups = Tile::kPanelColumns / 32;  // of a panel
    const auto [key, quad_lane] = own_lane<Traits>();
    uint32_t group_in_panel[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) group_in_panel[i] = k_tile + Traits::PermutedKeys::offset(key, 4 * i + quad_lane);
#pragma unroll
    for (int j = 0; j < Traits::kHeadDim / 32; ++j) {
        const uint32_t from = group_in_panel[j % kGroups] + j / kGroups * Tile::kPanelBytes;
        const uint4 low = load_shared_16(from), high = load_shared_16(from + 8 * Tile::kRowBytes);  // keys key, key + 8
        fragments[2 * j][0] = low.x, fragments[2 * j][1] = high.x;
        fragments[2 * j][2] = low.y, fragments[2 * j][3] = high.y;
        fragments[2 * j + 1][0] = low.z, fragments[2 * j + 1][1] = high.z;
        fragments[2 * j + 1][2] = low.w, fragments[2 * j + 1][3] = high.w;
    }
}

// S^T = K Q^T
template <typename Traits>
__device__ __forceinline__ void issue_scores(Scores<Traits>& s, const KeyFragments<Traits>& keys, uint32_t q_tile) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
        wgmma_rs<typename Traits::T, Major::kSum>(
            s, keys[step], Traits::QueryTile::along_columns(q_tile, step), step > 0);
    }
    wgmma_commit();
}

// dP^T = V dO^T
template <typename Traits>
__device__ __forceinline__ void issue_dprobs(Scores<Traits>& dp, uint32_t v_tile, uint32_t dout_tile) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
        wgmma_ss<typename Traits::T, Major::kSum, Major::kSum>(
            dp, Traits::KeyTile::along_columns(v_tile, step), Traits::QueryTile::along_columns(dout_tile, step),
            step > 0);
    }
    wgmma_commit();
}

// dV += P^T dO or dK += dS^T Q
template <typename Traits>
__device__ __forceinline__ void issue_key_gradient(
    KeyGradient<Traits>& gradient, const ScoreFragments<Traits>& scores, uint32_t query_tile) {
    auto& accumulators = reinterpret_cast<float (&)[Traits::kHeadDim / 2]>(gradient);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kTileQ / 16; ++step) {
        wgmma_rs<typename Traits::T, Major::kOuter>(
            accumulators, scores[step], Traits::QueryTile::along_rows(query_tile, step), true);
    }
    wgmma_commit();
}

// dQ = dS K
template <typename Traits>
__device__ __forceinline__ void issue_query_gradient(QueryGradient<Traits>& dq, uint32_t dscore_tile, uint32_t k_tile) {
    auto& accumulators = reinterpret_cast<float (&)[Traits::kHeadDim / 2]>(dq);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kTileK / 16; ++step) {
        wgmma_ss<typename Traits::T, Major::kOuter, Major::kOuter>(
            accumulators, Traits::ScoreTile::along_rows(dscore_tile, step), Traits::KeyTile::along_rows(k_tile, step),
            step > 0);
    }
    wgmma_commit();
}

// Sets to zero what belongs to keys that a query does not see. A choice, not a product: a masked score may be NaN.
template <typename Traits>
__device__ __forceinline__ void zero_invisible(Scores<Traits>& s, const QueryTileRows<Traits>& rows) {
    // Rows ascend by query, so the first one sees least. Rows behind the last repeat it and have lse = +inf.
    if (rows.last_visible[0] >= Traits::kTileK - 1) return;
    const auto [key, quad_lane] = own_lane<Traits>();
#pragma unroll
    for (int n = 0; n < Traits::kTileQ / 8; ++n) {
        const int2 last = *reinterpret_cast<const int2*>(&rows.last_visible[n * 8 + quad_lane * 2]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (key + i / 2 * 8 > (i % 2 ? last.y : last.x)) s[4 * n + i] = 0.f;
    }
}

// P = exp2(S - lse), in place
template <typename Traits>
__device__ __forceinline__ void scores_to_probs(
    Scores<Traits>& s, const SharedTiles<Traits>& shared, const QueryTileRows<Traits>& rows, float softmax_scale_log2) {
    const auto [key, quad_lane] = own_lane<Traits>();
    if (shared.state->nonfinite_keys) {
        const float poison[2] = {shared.poison[key], shared.poison[key + 8]};
#pragma unroll
        for (int i = 0; i < Traits::kTileQ / 2; ++i) s[i] += poison[i / 2 % 2];
    }
#pragma unroll
    for (int n = 0; n < Traits::kTileQ / 8; ++n) {
        const float2 lse = *reinterpret_cast<const float2*>(&rows.lse_log2[n * 8 + quad_lane * 2]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            s[4 * n + i] = exp2_approx(fmaf(s[4 * n + i], softmax_scale_log2, -(i % 2 ? lse.y : lse.x)));
    }
    zero_invisible<Traits>(s, rows);
}

// dS = P (dP - delta), in place
template <typename Traits>
__device__ __forceinline__ void dprobs_to_dscores(
    Scores<Traits>& dp, const Scores<Traits>& probs, const QueryTileRows<Traits>& rows) {
    const int quad_lane = own_lane<Traits>().quad_lane;
#pragma unroll
    for (int n = 0; n < Traits::kTileQ / 8; ++n) {
        const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[n * 8 + quad_lane * 2]);
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[4 * n + i] = probs[4 * n + i] * (dp[4 * n + i] - (i % 2 ? delta.y : delta.x));
    }
    zero_invisible<Traits>(dp, rows);
}

template <typename Traits>
__device__ __forceinline__ void pack_scores(ScoreFragments<Traits>& fragments, const Scores<Traits>& s) {
#pragma unroll
    for (int i = 0; i < Traits::kTileQ / 4; ++i)
        fragments[i / 4][i % 4] = HalfType<typename Traits::T>::pack(s[2 * i], s[2 * i + 1]);
}

// dS^T, its keys where K has them.
template <typename Traits>
__device__ __forceinline__ void store_dscores(uint32_t dscore_tile, const ScoreFragments<Traits>& fragments) {
    static_assert(Traits::ScoreTile::kPanelColumns == Traits::kTileQ);  // chunks differ in bits of their own
    const int thread = own_thread<Traits>(), lane = thread % 32;
    const int row = Traits::PermutedKeys::row(thread / 32 * 16 + lane % 16);
    const uint32_t first = Traits::ScoreTile::offset(row, lane / 16);
#pragma unroll
    for (int step = 0; step < Traits::kTileQ / 16; ++step)
        stmatrix_x4(dscore_tile + (first ^ step * 32), fragments[step]);
}

// Where a lane's two rows of dQ go: the chunk of its first 8 columns.
struct QueryGradientTarget {
    unsigned char* chunk[2];
    int columns_left[2];  // of head_dim from that chunk on; none where the row does not exist
};

template <typename Traits>
__device__ __forceinline__ QueryGradientTarget
query_gradient_target(const QueryTileRows<Traits>& rows, const ItemState& state, int head_dim) {
    const auto [row, quad_lane] = own_lane<Traits>();
    QueryGradientTarget target;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int partial_row = rows.partial_row[row + half * 8];
        target.chunk[half] = state.partial + quad_lane * 16 + static_cast<int64_t>(partial_row) * (head_dim * 2);
        target.columns_left[half] = partial_row >= 0 ? head_dim - quad_lane * 8 : 0;
    }
    return target;
}

// dQ's partials, times softmax_scale. The scale comes last, here and in dK: an fp16 dS that carried it would underflow
// sooner than the gradients do.
template <typename Traits>
__device__ __forceinline__ void store_query_gradient(
    const QueryGradient<Traits>& dq, const QueryGradientTarget& target, float softmax_scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        auto scaled_pair = [&](const float (&tile)[4]) {
            return HalfType<typename Traits::T>::pack(
                tile[2 * half] * softmax_scale, tile[2 * half + 1] * softmax_scale);
        };
#pragma unroll
        for (int group = 0; group < Traits::kHeadDim / 32; ++group) {
            const auto& tiles = dq[group];
            const uint4 chunk =
                make_uint4(scaled_pair(tiles[0]), scaled_pair(tiles[1]), scaled_pair(tiles[2]), scaled_pair(tiles[3]));
            store_global_16_streaming(target.chunk[half] + 64 * group, chunk, 32 * group < target.columns_left[half]);
        }
    }
}

template <typename Traits>
__device__ __forceinline__ void store_key_gradients(
    const KeyGradient<Traits>& dk, const KeyGradient<Traits>& dv, const BackwardMainParams& p, const ItemState& state) {
    using T = typename Traits::T;
    const auto [key, quad_lane] = own_lane<Traits>();
    const int column = quad_lane * 2;
    const WorkItem& item = state.queue.item;
    const GradientTarget target = gradient_target(state.cell_edges, p.plan, item);
    store_key_gradient<T>(dk, 0, key, column, p, item, target);
    store_key_gradient<T>(dv, 1, key, column, p, item, target);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    backward_main_sm90(const __grid_constant__ BackwardMainParams p) {
    await_kernel_before();
    const SharedTiles<Traits> shared =
        carve_shared_memory<Traits>(static_cast<unsigned char*>(dynamic_shared_memory()));
    const WorkItem& item = shared.state->queue.item;

    request_work_item(shared.state->queue, p.geometry, p.plan, claim_work_item(p.plan));
    while (fetch_work_item(shared.state->queue, p.geometry, p.plan, Traits::kTileK)) {
        // A tile is described three tiles before its turn, finished two, and gathered one.
        auto edge_of = [&](int tile) {
            return load_edge(p.geometry, p.plan, item, tile * Traits::kTileQ + own_thread<Traits>() % Traits::kTileQ);
        };
        auto describe = [&](int tile, int edge) {
            describe_rows(shared.rows_of(tile), p, item, tile * Traits::kTileQ, edge);
        };
        const int first_edges[3] = {edge_of(0), edge_of(1), edge_of(2)};
        int next_edge = edge_of(3);
        load_kv_block(shared, p);
        cp_async_commit();
#pragma unroll
        for (int tile = 0; tile < 3; ++tile) describe(tile, first_edges[tile]);
        __syncthreads();  // these rows are there, but for lse and delta
        gather_queries(shared, p, 0);
        cp_async_commit();
        cp_async_wait<1>();
        finish_kv_block(shared, p);
        cp_async_wait<0>();
        __syncthreads();  // lse, delta, K
        finish_rows(shared.rows_of(0));
        finish_rows(shared.rows_of(1));

        const int num_tiles = (item.num_rows + Traits::kTileQ - 1) / Traits::kTileQ;
        KeyGradient<Traits> dk = {}, dv = {};
        for (int tile = 0; tile < num_tiles; ++tile) {
            const QueryTileRows<Traits>& rows = shared.rows_of(tile);
            const bool last = tile + 1 == num_tiles;
            const int claimed = last ? claim_work_item(p.plan) : 0;
            KeyFragments<Traits> keys;
            load_key_fragments<Traits>(keys, shared.k);
            cp_async_wait<0>();
            fence_async_proxy();
            __syncthreads();  // Q and dO of this tile are there; the tile before is done with

            Scores<Traits> s, dp;
            issue_scores<Traits>(s, keys, shared.q(tile));
            issue_dprobs<Traits>(dp, shared.v, shared.dout(tile));
            if (!last) {
                gather_queries(shared, p, tile + 1);
            } else {
                request_work_item(shared.state->queue, p.geometry, p.plan, claimed);
            }
            if (tile + 3 < num_tiles) describe(tile + 3, next_edge);
            cp_async_commit();
            next_edge = edge_of(tile + 4);

            ScoreFragments<Traits> probs, dscores;
            wgmma_wait<1>();  // S
            scores_to_probs<Traits>(s, shared, rows, p.softmax_scale_log2);
            pack_scores<Traits>(probs, s);
            issue_key_gradient<Traits>(dv, probs, shared.dout(tile));

            wgmma_wait<1>();  // dP
            dprobs_to_dscores<Traits>(dp, s, rows);
            pack_scores<Traits>(dscores, dp);
            issue_key_gradient<Traits>(dk, dscores, shared.q(tile));
            store_dscores<Traits>(shared.dscores, dscores);
            fence_async_proxy();
            __syncthreads();  // dS^T is there

            QueryGradient<Traits> dq;
            issue_query_gradient<Traits>(dq, shared.dscores, shared.k);
            if (tile + 2 < num_tiles) finish_rows(shared.rows_of(tile + 2));
            const QueryGradientTarget target = query_gradient_target(rows, *shared.state, p.geometry.head_dim);
            wgmma_wait<0>();
            store_query_gradient<Traits>(dq, target, p.softmax_scale);
        }
        store_key_gradients<Traits>(dk, dv, p, *shared.state);
    }
}

}  // namespace backward_main_sm90

template <typename T, int kHeadDim, int kTileK>
void launch_backward_main_sm90(const BackwardMainParams& p, cudaStream_t stream) {
    using Traits = BackwardMainSm90Traits<T, kHeadDim, kTileK>;
    launch_main<Traits>("backward_main_sm90", backward_main_sm90::backward_main_sm90<Traits>, p, stream);
}

}  // namespace fsa
