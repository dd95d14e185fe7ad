// The backward main kernel on warp-level MMA. One source serves every GPU from sm_80 on.
//
// A CTA keeps K and V of a sub-block in shared memory and its dK and dV in registers, and walks tiles of query rows.
// Scores are computed transposed (keys are rows), so that P^T and dS^T, written to shared memory once, are A operands
// of dV = P^T dO and dK = dS^T Q as they stand and of dQ = dS K through a transposing load. K and V are interleaved
// (layout.h): the chunks of Q and dO that a lane loads whole then match its A fragments, and a lane's dQ accumulators
// are 8 neighbouring columns.
#pragma once

#include "backward/key_gradients.cuh"
#include "backward/main.h"
#include "backward/main_traits.h"
#include "device/convert.cuh"
#include "device/layout.h"
#include "device/load_tile.cuh"
#include "device/ptx.cuh"
#include "device/softmax.cuh"
#include "device/work_item.cuh"
#include "host/launch_main.h"

namespace fsa {
namespace backward_main {

// The query rows of a tile, in shared memory.
template <typename Traits>
struct QueryTileRows {
    int64_t q_offset[Traits::kTileQ];     // elements from the start of q
    int64_t dout_offset[Traits::kTileQ];  // elements from the start of dout
    int partial_row[Traits::kTileQ];      // of dq_partial; -1: no such row
    int last_visible[Traits::kTileQ];     // counted from the sub-block's first key
    float lse_log2[Traits::kTileQ];       // +inf where the row must not contribute: exp2(x - inf) = 0
    float delta[Traits::kTileQ];
};

// What a CTA knows of its current work item. It lies in shared memory: the accumulators leave no registers for it.
template <typename Traits>
struct ItemState {
    WorkItemQueue queue;
    typename Traits::T* dq_partial;  // from the item's KV head on
    int cell_edges[2];               // where the cell's edges begin and end
    int nonfinite_keys;              // K holds inf or NaN
    int next_edge[Traits::kTileQ];   // of row i, the tile after next: written and read by thread i
};

template <typename Traits>
struct SharedTiles {
    uint32_t k, v, q, dout, probs, dscores;  // shared-memory addresses; probs and dscores are [keys][queries]
    QueryTileRows<Traits>* rows;             // [2]
    float* poison;                           // [tile_k]: NaN for a key that holds inf or NaN, else 0
    ItemState<Traits>* state;
};

template <typename Traits>
__device__ __forceinline__ SharedTiles<Traits> carve_shared_memory(unsigned char* shared) {
    static_assert(
        sizeof(QueryTileRows<Traits>) == Traits::kRowBytes && sizeof(ItemState<Traits>) <= Traits::kStateBytes);
    SharedTiles<Traits> s;
    s.k = shared_address(shared);
    s.v = s.k + Traits::kKeyTileBytes;
    s.q = s.v + Traits::kKeyTileBytes;
    s.dout = s.q + Traits::kQueryTileBytes;
    s.probs = s.dout + Traits::kQueryTileBytes;
    s.dscores = s.probs + Traits::kProbTileBytes;
    s.rows = reinterpret_cast<QueryTileRows<Traits>*>(shared + Traits::kTileBytes);
    s.poison = reinterpret_cast<float*>(shared + Traits::kTileBytes + 2 * Traits::kRowBytes);
    s.state = reinterpret_cast<ItemState<Traits>*>(s.poison + Traits::kTileK);
    return s;
}

// Thread i < kTileQ describes row i of a tile.
template <typename Traits>
__device__ __forceinline__ void describe_row(
    QueryTileRows<Traits>& rows, const BackwardMainParams& p, const WorkItem& item, int first_row, int edge) {
    const int i = threadIdx.x;
    const QueryRow r = make_query_row(p.geometry, item, first_row + i, edge);
    const int64_t head = static_cast<int64_t>(item.kv_head) * p.geometry.group_size + r.group_head;
    const int64_t at = head * p.geometry.sequences.total_q + r.query;
    const float lse = __ldg(p.lse + at), delta = __ldg(p.delta + at);
    const bool contributes = r.partial_row >= 0 && lse != -INFINITY;
    rows.q_offset[i] = r.query * p.q.token_stride + head * p.q.head_stride;
    rows.dout_offset[i] = r.query * p.dout.token_stride + head * p.dout.head_stride;
    rows.partial_row[i] = r.partial_row;
    rows.last_visible[i] = r.last_visible;
    rows.lse_log2[i] = contributes ? lse * kLog2E : INFINITY;
    rows.delta[i] = contributes ? delta : 0.f;
}

// Q and dO of a tile, asynchronously. Rows that do not exist become zeros.
template <typename Traits>
__device__ __forceinline__ void gather_queries(
    const SharedTiles<Traits>& shared, const QueryTileRows<Traits>& rows, const BackwardMainParams& p) {
    using T = typename Traits::T;
    using Tile = SwizzledTile<Traits::kHeadDim * 2>;
    constexpr int kChunks = Traits::kHeadDim / 8;
    static_assert(Traits::kTileQ * kChunks % Traits::kThreads == 0);
    const int thread = thread_index_unhoisted(), num_chunks = p.geometry.head_dim / 8;
#pragma unroll 2  // all at once would hold a dozen addresses
    for (int i = 0; i < Traits::kTileQ * kChunks / Traits::kThreads; ++i) {
        const int index = i * Traits::kThreads + thread, row = index / kChunks, chunk = index % kChunks;
        const bool valid = rows.partial_row[row] >= 0 && chunk < num_chunks;
        const int column = valid ? chunk * 8 : 0;
        const uint32_t to = Tile::offset(row, chunk);
        cp_async_16(shared.q + to, static_cast<const T*>(p.q.data) + rows.q_offset[row] + column, valid);
        cp_async_16(shared.dout + to, static_cast<const T*>(p.dout.data) + rows.dout_offset[row] + column, valid);
    }
    cp_async_commit();
}

// K and V of the sub-block. All threads of the CTA take part.
template <typename Traits>
__device__ __forceinline__ void load_kv_block(const SharedTiles<Traits>& shared, const BackwardMainParams& p) {
    using T = typename Traits::T;
    const WorkItem& item = shared.state->queue.item;
    const int num_chunks = p.geometry.head_dim / 8;
    if (threadIdx.x < Traits::kTileK) shared.poison[threadIdx.x] = 0.f;
    load_cell_edges(shared.state->cell_edges, p.plan, item);
    __syncthreads();
    const TileMagnitude keys = load_tile_interleaved<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads>(
        shared.k, {row_pointer<T>(p.k, item.key_token, item.kv_head), p.k.token_stride, item.num_keys, num_chunks},
        [&](int row) { shared.poison[row] = NAN; });
    load_tile_interleaved<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads>(
        shared.v, {row_pointer<T>(p.v, item.key_token, item.kv_head), p.v.token_stride, item.num_keys, num_chunks},
        [](int) {});
    const int nonfinite = __syncthreads_or(keys.nonfinite);
    if (thread_index_unhoisted() == 0) {  // seen behind the barrier before the first tile
        shared.state->nonfinite_keys = nonfinite;
        shared.state->dq_partial =
            static_cast<T*>(p.dq_partial) + first_partial_row(p.geometry, item.head) * p.geometry.head_dim;
    }
}

// A strip of scores: the warp's 16 keys (rows) x 16 queries, as two n8 tiles. Wider ones would not fit beside dK and
// dV.
using ScoresT = float[2][4];

// scores = A B^T: K Q^T or V dO^T, for the queries first_query .. first_query + 15 of the tile.
template <typename Traits>
__device__ __forceinline__ void compute_scores_t(
    ScoresT& scores, uint32_t key_tile, uint32_t query_tile, int first_query) {
    using Tile = SwizzledTile<Traits::kHeadDim * 2>;
    constexpr int kRow = Traits::kHeadDim * 2;
    const int thread = thread_index_unhoisted(), warp = thread / 32, lane = thread % 32;
    const int key_row = warp % Traits::kKeyWarps * 16 + lane % 16, query_row = first_query + lane / 4;
    // by parity of the group of 32 columns
    const uint32_t key_chunk[2][2] = {
        {key_tile + Tile::offset(key_row, lane / 16), key_tile + Tile::offset(key_row, lane / 16 + 2)},
        {key_tile + Tile::offset(key_row, lane / 16 + 4), key_tile + Tile::offset(key_row, lane / 16 + 6)},
    };
    const uint32_t query_chunk[2] = {
        query_tile + Tile::offset(query_row, lane % 4), query_tile + Tile::offset(query_row, lane % 4 + 4)};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = 0.f;
#pragma unroll
    for (int j = 0; j < Traits::kHeadDim / 32; ++j) {
        uint32_t a[2][4];
        ldmatrix_x4(a[0], key_chunk[j % 2][0] + j / 2 * 128);
        ldmatrix_x4(a[1], key_chunk[j % 2][1] + j / 2 * 128);
        const uint4 b0 = load_shared_16(query_chunk[j % 2] + j / 2 * 128),
                    b1 = load_shared_16(query_chunk[j % 2] + j / 2 * 128 + 8 * kRow);
        mma_m16n8k16<typename Traits::T>(scores[0], a[0], b0.x, b0.y);
        mma_m16n8k16<typename Traits::T>(scores[1], a[0], b1.x, b1.y);
        mma_m16n8k16<typename Traits::T>(scores[0], a[1], b0.z, b0.w);
        mma_m16n8k16<typename Traits::T>(scores[1], a[1], b1.z, b1.w);
    }
}

// P = exp2(S - lse) and dS = P (dP - delta), both zero where a query does not see the key, to shared
// memory.
template <typename Traits>
__device__ __forceinline__ void exp_and_store_probs(
    const SharedTiles<Traits>& shared, const QueryTileRows<Traits>& rows, const BackwardMainParams& p, ScoresT& s,
    const ScoresT& dp, int first_query) {
    using Tile = SwizzledTile<Traits::kTileQ * 2>;
    using Half = HalfType<typename Traits::T>;
    const int thread = thread_index_unhoisted(), warp = thread / 32, lane = thread % 32;
    const int key = warp % Traits::kKeyWarps * 16 + lane / 4;
    // Rows ascend by query, so the first one sees least. Rows behind the last repeat it and have lse = +inf.
    const bool masked = rows.last_visible[0] < Traits::kTileK - 1, nonfinite_keys = shared.state->nonfinite_keys != 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int query = first_query + n * 8 + lane % 4 * 2;
        const float2 lse = *reinterpret_cast<const float2*>(&rows.lse_log2[query]);
        const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[query]);
        float prob[4], dscore[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (nonfinite_keys) s[n][i] += shared.poison[key + i / 2 * 8];
            prob[i] = exp2_approx(fmaf(s[n][i], p.softmax_scale_log2, -(i % 2 ? lse.y : lse.x)));
            dscore[i] = prob[i] * (dp[n][i] - (i % 2 ? delta.y : delta.x));
        }
        if (masked) {
            const int2 last = *reinterpret_cast<const int2*>(&rows.last_visible[query]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (key + i / 2 * 8 > (i % 2 ? last.y : last.x)) prob[i] = dscore[i] = 0.f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t at = Tile::offset(key + half * 8, first_query / 8 + n) + lane % 4 * 4;
            store_shared_4(shared.probs + at, Half::pack(prob[2 * half], prob[2 * half + 1]));
            store_shared_4(shared.dscores + at, Half::pack(dscore[2 * half], dscore[2 * half + 1]));
        }
    }
}

// P^T and dS^T of the warp's keys and its half of the queries.
template <typename Traits>
__device__ __forceinline__ void compute_probs(
    const SharedTiles<Traits>& shared, const QueryTileRows<Traits>& rows, const BackwardMainParams& p) {
    constexpr int kQueries = Traits::kTileQ / Traits::kHalves;
    const int begin = thread_index_unhoisted() / 32 / Traits::kKeyWarps * kQueries;
#pragma unroll 1
    for (int query = begin; query < begin + kQueries; query += 16) {
        ScoresT s, dp;
        compute_scores_t<Traits>(s, shared.k, shared.q, query);
        compute_scores_t<Traits>(dp, shared.v, shared.dout, query);
        exp_and_store_probs(shared, rows, p, s, dp, query);
    }
}

// 16 keys x kColumns
template <typename Traits>
using KeyGradient = float[Traits::kColumns / 8][4];

// gradient += A B with A = P^T or dS^T [keys][queries] and B = dO or Q [queries][columns].
template <typename Traits>
__device__ __forceinline__ void accumulate_key_gradient(
    KeyGradient<Traits>& gradient, uint32_t prob_tile, uint32_t query_tile) {
    using ProbTile = SwizzledTile<Traits::kTileQ * 2>;
    using QueryTile = SwizzledTile<Traits::kHeadDim * 2>;
    const int thread = thread_index_unhoisted(), warp = thread / 32, lane = thread % 32;
    const int key_row = warp % Traits::kKeyWarps * 16 + lane % 16,
              first_chunk = warp / Traits::kKeyWarps * (Traits::kColumns / 8);
#pragma unroll 2  // unrolled whole, fragments of later steps are fetched early and the accumulators spill
    for (int k = 0; k < Traits::kTileQ / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, prob_tile + ProbTile::offset(key_row, 2 * k + lane / 16));
#pragma unroll
        for (int pair = 0; pair < Traits::kColumns / 16; ++pair) {
            uint32_t b[4];
            ldmatrix_x4_trans(
                b, query_tile + QueryTile::offset(k * 16 + lane % 16, first_chunk + 2 * pair + lane / 16));
            mma_m16n8k16<typename Traits::T>(gradient[2 * pair], a, b[0], b[1]);
            mma_m16n8k16<typename Traits::T>(gradient[2 * pair + 1], a, b[2], b[3]);
        }
    }
}

// dQ = dS K * softmax_scale, 32 columns at a time, each stored as soon as it is done. The scale comes last, here and in
// dK: an fp16 dS that carried it would underflow sooner than the gradients do.
template <typename Traits>
__device__ __forceinline__ void compute_dq_and_store(
    const SharedTiles<Traits>& shared, const QueryTileRows<Traits>& rows, const BackwardMainParams& p) {
    using T = typename Traits::T;
    using Tile = SwizzledTile<Traits::kHeadDim * 2>;
    using ScoreTile = SwizzledTile<Traits::kTileQ * 2>;
    using Half = HalfType<T>;
    constexpr int kGroups = Traits::kHeadDim / 32;
    const int thread = thread_index_unhoisted(), warp = thread / 32, lane = thread % 32, head_dim = p.geometry.head_dim;
    const int first_row = warp % Traits::kDqRowWarps * 16 + lane / 4;
#pragma unroll
    for (int step = 0; step < (kGroups + Traits::kDqColumnWarps - 1) / Traits::kDqColumnWarps; ++step) {
        const int group = step * Traits::kDqColumnWarps + warp / Traits::kDqRowWarps;
        if (group >= kGroups) break;
        float dq[4][4] = {};
#pragma unroll
        for (int k = 0; k < Traits::kTileK / 16; ++k) {
            uint32_t a[4];  // dS, from dS^T
            ldmatrix_x4_trans(
                a,
                shared.dscores + ScoreTile::offset(
                                     k * 16 + lane % 8 + lane / 16 * 8, warp % Traits::kDqRowWarps * 2 + lane / 8 % 2));
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, shared.k + Tile::offset(k * 16 + lane % 16, group * 4 + 2 * pair + lane / 16));
                mma_m16n8k16<T>(dq[2 * pair], a, b[0], b[1]);
                mma_m16n8k16<T>(dq[2 * pair + 1], a, b[2], b[3]);
            }
        }
        const int column = 32 * group + 8 * (lane % 4);
        auto scaled_pair = [&](const float (&tile)[4], int x) {
            return Half::pack(tile[x] * p.softmax_scale, tile[x + 1] * p.softmax_scale);
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int x = 2 * half, partial_row = rows.partial_row[first_row + half * 8];
            if (partial_row >= 0 && column < head_dim) {
                T* const to = shared.state->dq_partial + static_cast<int64_t>(partial_row) * head_dim + column;
                *reinterpret_cast<uint4*>(to) = make_uint4(
                    scaled_pair(dq[0], x), scaled_pair(dq[1], x), scaled_pair(dq[2], x), scaled_pair(dq[3], x));
            }
        }
    }
}

template <typename Traits>
__device__ __forceinline__ void store_key_gradients(
    const KeyGradient<Traits>& dk, const KeyGradient<Traits>& dv, const BackwardMainParams& p,
    const SharedTiles<Traits>& shared) {
    using T = typename Traits::T;
    const int thread = thread_index_unhoisted(), warp = thread / 32, lane = thread % 32;
    const int key = warp % Traits::kKeyWarps * 16 + lane / 4;
    const WorkItem& item = shared.state->queue.item;
    const int first_column = warp / Traits::kKeyWarps * Traits::kColumns + lane % 4 * 2;
    const GradientTarget target = gradient_target(shared.state->cell_edges, p.plan, item);
    store_key_gradient<T>(dk, 0, key, first_column, p, item, target);
    store_key_gradient<T>(dv, 1, key, first_column, p, item, target);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    backward_main(const __grid_constant__ BackwardMainParams p) {
    await_kernel_before();
    unsigned char* shared_memory = static_cast<unsigned char*>(dynamic_shared_memory());
    const SharedTiles<Traits> shared = carve_shared_memory<Traits>(shared_memory);
    const Geometry& g = p.geometry;
    auto describes_row = [] { return thread_index_unhoisted() < Traits::kTileQ; };

    const WorkItem& item = shared.state->queue.item;

    request_work_item(shared.state->queue, g, p.plan, claim_work_item(p.plan));
    while (fetch_work_item(shared.state->queue, g, p.plan, Traits::kTileK)) {
        request_work_item(shared.state->queue, g, p.plan, claim_work_item(p.plan));
        load_kv_block(shared, p);

        // Edges are fetched two tiles ahead, the description of rows one; Q and dO as soon as the tile before is done
        // with.
        constexpr int kTileQ = Traits::kTileQ;
        auto edge_of = [&](int first_row) { return load_edge(g, p.plan, item, first_row + threadIdx.x); };
        auto rows_of = [&](int first_row) -> QueryTileRows<Traits>& { return shared.rows[first_row / kTileQ % 2]; };
        if (describes_row()) {
            describe_row(rows_of(0), p, item, 0, edge_of(0));
            shared.state->next_edge[threadIdx.x] = edge_of(kTileQ);
        }
        __syncthreads();
        gather_queries(shared, rows_of(0), p);

        KeyGradient<Traits> dk = {}, dv = {};
        for (int row = 0; row < item.num_rows; row += kTileQ) {
            cp_async_wait<0>();
            __syncthreads();  // Q, dO and the rows of this tile are there
            if (describes_row()) {
                describe_row(rows_of(row + kTileQ), p, item, row + kTileQ, shared.state->next_edge[threadIdx.x]);
                shared.state->next_edge[threadIdx.x] = edge_of(row + 2 * kTileQ);
            }
            compute_probs(shared, rows_of(row), p);
            __syncthreads();  // P^T and dS^T are there
            accumulate_key_gradient<Traits>(dv, shared.probs, shared.dout);
            accumulate_key_gradient<Traits>(dk, shared.dscores, shared.q);
            __syncthreads();  // Q and dO are done with; dS^T is until the next tile's first barrier
            if (row + kTileQ < item.num_rows) gather_queries(shared, rows_of(row + kTileQ), p);
            compute_dq_and_store(shared, rows_of(row), p);
        }
        store_key_gradients<Traits>(dk, dv, p, shared);
    }
}

}  // namespace backward_main

template <typename T, int kHeadDim, int kTileK>
void launch_backward_main(const BackwardMainParams& p, cudaStream_t stream) {
    using Traits = BackwardMainTraits<T, kHeadDim, kTileK>;
    launch_main<Traits>("backward_main", backward_main::backward_main<Traits>, p, stream);
}

}  // namespace fsa
