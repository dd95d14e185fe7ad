// The forward main kernel on warp-level MMA. One source serves every GPU from sm_80 on.
//
// A CTA keeps K and V of a sub-block in shared memory; each of its warps takes tiles of query rows on its own, with
// no barrier in the loop. Neither Q nor O passes through shared memory: query rows go from global memory straight
// into A fragments (the sum over head_dim runs in a permuted order, the same for K), and V is stored so that a lane's
// accumulators are 8 neighbouring columns, one 16-byte store. The next tile's rows are requested as soon as the
// scores of this one have used up the fragments.
#pragma once

#include <type_traits>

#include "device/convert.cuh"
#include "device/layout.h"
#include "device/load_tile.cuh"
#include "device/ptx.cuh"
#include "device/softmax.cuh"
#include "device/work_item.cuh"
#include "forward/main.h"
#include "forward/main_traits.h"
#include "launch.h"

namespace fsa {
namespace forward_main {

// What a CTA knows of its current work item. It lies in shared memory: the inner loop has better uses for registers.
template <typename Traits>
struct ItemState {
    WorkItem item;
    uint32_t warp_max[Traits::kWarps];
    float output_scale;    // 2^-value_exponent
    int nonfinite_values;  // V holds inf or NaN
};

template <typename Traits>
struct SharedTiles {
    uint32_t k, v;  // shared-memory addresses
    ItemState<Traits>* state;
};

// Row i of a lane (i = 0 .. 2 * kMmaRows - 1) is row 8 * i + lane / 4 of the warp's tile.
template <typename Traits>
constexpr int kLaneRows = 2 * Traits::kMmaRows;

// Chunk 4j + lane % 4 of each of the lane's rows: words 0, 1 are the A fragment of step 2j, words 2, 3 that of step
// 2j + 1.
template <typename Traits>
using QueryFragments = uint4[kLaneRows<Traits>][Traits::kHeadDim / 32];

template <typename Traits>
using Scores = float[Traits::kMmaRows][Traits::kTileK / 8][4];

// P as A fragments: [m16 tile][n8 tile of the scores][row half]
template <typename Traits>
using Probs = uint32_t[Traits::kMmaRows][Traits::kTileK / 8][2];

template <typename Traits>
__device__ __forceinline__ void load_queries(
    QueryFragments<Traits>& q, const ForwardMainParams& p, const WorkItem& item, const QueryRow& row) {
    using T = typename Traits::T;
    const int lane = threadIdx.x % 32, num_chunks = p.geometry.head_dim / 8;
    const T* own = row_pointer<T>(p.q, row.query, item.kv_head * p.geometry.group_size + row.group_head);
#pragma unroll
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const unsigned long long address =
            __shfl_sync(~0u, reinterpret_cast<unsigned long long>(own), 8 * i + lane / 4);
        const uint4* chunks = reinterpret_cast<const uint4*>(address) + lane % 4;
#pragma unroll
        for (int j = 0; j < Traits::kHeadDim / 32; ++j) {
            q[i][j] = 4 * j + lane % 4 < num_chunks ? __ldg(chunks + 4 * j) : make_uint4(0, 0, 0, 0);
        }
    }
}

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

// Keys that a row does not see get -inf: causality and the end of the sequence at once.
template <typename Traits>
__device__ __forceinline__ void mask_invisible(Scores<Traits>& s, const QueryRow& row) {
    const int lane = threadIdx.x % 32;
    if (!__any_sync(~0u, row.last_visible < Traits::kTileK - 1)) return;
#pragma unroll
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const int last = __shfl_sync(~0u, row.last_visible, 8 * i + lane / 4);
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n)
#pragma unroll
            for (int x = 0; x < 2; ++x)
                if (n * 8 + lane % 4 * 2 + x > last) s[i / 2][n][i % 2 * 2 + x] = -INFINITY;
    }
}

// P = softmax(S) * output_scale, and the row's log-sum-exp to memory. P is normalised here rather than O, which is
// wider.
template <typename Traits>
__device__ __forceinline__ void normalise_and_store_lse(
    Probs<Traits>& probs, const Scores<Traits>& s, const ForwardMainParams& p, const ItemState<Traits>& state,
    const QueryRow& row) {
    const int lane = threadIdx.x % 32;
    float* lse = p.lse_partial + first_partial_row(p.geometry, state.item.head);
#pragma unroll
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const int m = i / 2, half = i % 2;
        float row_max = -INFINITY;
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n)
            row_max = fmaxf(row_max, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
        const float shift = finite_shift(quad_max(row_max)) * p.softmax_scale_log2;

        float e[Traits::kTileK / 4], row_sum = 0.f;
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 4; ++n) {
            e[n] = exp2_approx(fmaf(s[m][n / 2][half * 2 + n % 2], p.softmax_scale_log2, -shift));
            row_sum += e[n];
        }
        row_sum = quad_sum(row_sum);

        const float scale = reciprocal_or_zero(row_sum) * state.output_scale;
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n) {
            probs[m][n][half] = HalfType<typename Traits::T>::pack(e[2 * n] * scale, e[2 * n + 1] * scale);
        }
        const int partial_row = __shfl_sync(~0u, row.partial_row, 8 * i + lane / 4);
        if (lane % 4 == 0 && partial_row >= 0) lse[partial_row] = log2_sum_exp(shift, row_sum);
    }
}

// O = P V, 32 columns at a time, each stored as soon as it is done.
template <typename Traits>
__device__ __forceinline__ void compute_pv_and_store(
    const Probs<Traits>& probs, uint32_t v_tile, const ForwardMainParams& p, const WorkItem& item,
    const QueryRow& row) {
    using Tile = SwizzledTile<Traits::kHeadDim * 2>;
    const int lane = threadIdx.x % 32, head_dim = p.geometry.head_dim;
    __half* o_partial = p.o_partial + first_partial_row(p.geometry, item.head) * head_dim;
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
        const int column = 32 * group + 8 * (lane % 4);
#pragma unroll
        for (int i = 0; i < kLaneRows<Traits>; ++i) {
            const auto& tiles = o[i / 2];
            const int x = i % 2 * 2;
            using Partial = HalfType<__half>;
            if (partial_row[i] >= 0 && column < head_dim) {
                *reinterpret_cast<uint4*>(o_partial + static_cast<int64_t>(partial_row[i]) * head_dim + column) =
                    make_uint4(
                        Partial::pack(tiles[0][x], tiles[0][x + 1]), Partial::pack(tiles[1][x], tiles[1][x + 1]),
                        Partial::pack(tiles[2][x], tiles[2][x + 1]), Partial::pack(tiles[3][x], tiles[3][x + 1]));
            }
        }
    }
}

// The power of two by which partials are divided, so that |V| < 2^15 and fp16 holds every convex combination of values.
// fp16 values keep theirs unless they reach 2^15: raising small ones would cost P its range.
template <typename T>
__device__ __forceinline__ int value_exponent(uint32_t packed_max) {
    const float2 m = HalfType<T>::unpack(packed_max);
    const float largest = fmaxf(m.x, m.y);
    if (largest == 0.f) return 0;
    const int exponent = ilogbf(largest) - 14;
    return std::is_same_v<T, __half> ? max(exponent, 0) : min(max(exponent, -100), 120);
}

// K and V of the sub-block, and what their values ask of the output. All threads of the CTA take part.
template <typename Traits>
__device__ __forceinline__ void load_kv_block(const SharedTiles<Traits>& shared, const ForwardMainParams& p) {
    using T = typename Traits::T;
    const WorkItem& item = shared.state->item;
    const int num_chunks = p.geometry.head_dim / 8;
    load_tile_async<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads>(
        shared.k, {row_pointer<T>(p.k, item.key_token, item.kv_head), p.k.token_stride, item.num_keys, num_chunks});
    cp_async_commit();
    const TileMagnitude values = load_tile_interleaved<T, Traits::kTileK, Traits::kHeadDim, Traits::kThreads>(
        shared.v, {row_pointer<T>(p.v, item.key_token, item.kv_head), p.v.token_stride, item.num_keys, num_chunks},
        [](int) {});
    const uint32_t low = __reduce_max_sync(~0u, values.packed_max & 0xffffu),
                   high = __reduce_max_sync(~0u, values.packed_max >> 16);
    if (threadIdx.x % 32 == 0) shared.state->warp_max[threadIdx.x / 32] = max(low, high);
    cp_async_wait<0>();
    const int nonfinite = __syncthreads_or(values.nonfinite);
    if (threadIdx.x == 0) {
        uint32_t largest = 0;
        for (const uint32_t x : shared.state->warp_max) largest = max(largest, x);
        const int exponent = value_exponent<T>(largest);
        p.value_exponent[static_cast<int64_t>(item.cell) * p.geometry.subs + item.sub] = exponent;
        shared.state->output_scale = __int_as_float((127 - exponent) << 23);
        shared.state->nonfinite_values = nonfinite;
    }
    __syncthreads();
}

template <typename Traits>
__device__ __forceinline__ void restore_nonfinite_values(
    const ForwardMainParams& p, const WorkItem& item, const QueryRow& row) {
    using T = typename Traits::T;
    __half* o_partial = p.o_partial + first_partial_row(p.geometry, item.head) * p.geometry.head_dim;
    const int lane = threadIdx.x % 32, head_dim = p.geometry.head_dim;
    const T* values = row_pointer<T>(p.v, item.key_token, item.kv_head);
#pragma unroll 1
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const int partial_row = __shfl_sync(~0u, row.partial_row, 8 * i + lane / 4);
        const int last = min(__shfl_sync(~0u, row.last_visible, 8 * i + lane / 4), item.num_keys - 1);
#pragma unroll 1
        for (int column = 8 * (lane % 4); partial_row >= 0 && column < head_dim; column += 32) {
            add_nonfinite_keys(
                values + column, p.v.token_stride, last,
                o_partial + static_cast<int64_t>(partial_row) * head_dim + column);
        }
        __syncwarp();
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    forward_main(const __grid_constant__ ForwardMainParams p) {
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    const uint32_t k_tile = shared_address(memory);
    const SharedTiles<Traits> shared = {
        k_tile, k_tile + Traits::kTileBytes, reinterpret_cast<ItemState<Traits>*>(memory + 2 * Traits::kTileBytes)};
    static_assert(sizeof(ItemState<Traits>) <= Traits::kStateBytes);
    const Geometry& g = p.geometry;
    const int warp = threadIdx.x / 32, tile_lane = threadIdx.x % Traits::kTileQ;

    const WorkItem& item = shared.state->item;

    for (int index = blockIdx.x; index < p.plan.max_items * g.subs; index = item.index + gridDim.x) {
        if (!fetch_work_item(&shared.state->item, g, p.plan, Traits::kTileK, index)) continue;
        load_kv_block(shared, p);

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
            normalise_and_store_lse<Traits>(probs, s, p, *shared.state, row);
            compute_pv_and_store<Traits>(probs, shared.v, p, item, row);
            if (shared.state->nonfinite_values) restore_nonfinite_values<Traits>(p, item, row);
            row = next_row;
        }
    }
}

}  // namespace forward_main

template <typename T, int kHeadDim, int kTileK>
void launch_forward_main(const ForwardMainParams& p, cudaStream_t stream) {
    using Traits = ForwardMainTraits<T, kHeadDim, kTileK>;
    const auto kernel = forward_main::forward_main<Traits>;
    const int ctas = min(p.plan.max_items * p.geometry.subs, sm_count() * Traits::kMinCtas);
    launch("forward_main", kernel, {dim3(ctas), Traits::kThreads, Traits::kSharedBytes}, p, stream);
}

}  // namespace fsa
