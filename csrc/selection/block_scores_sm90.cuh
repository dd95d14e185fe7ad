// Block scores for Hopper. The windows of a unit stay in shared memory while the queries of its run go through, head by head:
//
//   P = 2^(softmax_scale * log2(e) * Q K^T - lse * log2(e)), summed over the heads of the group in registers,
//   score of block j = sum over its windows of P times how many of the window's strides lie in it
//                      + the same for the windows of block j - 1 that reach over.
//
// While a warpgroup has its exponentials, the others have their products. Sums of a tile go through shared memory, so that the
// windows of a block come together in a lane, and out as whole rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "host/tensor_map.h"
#include "launch.h"
#include "selection/block_scores.h"
#include "selection/block_scores_loader.cuh"
#include "selection/block_scores_sm90_traits.h"

namespace fsa {
namespace block_scores {

// The windows that a query of the sequence sees are the first so many.
__device__ __forceinline__ int seen_windows(const BlockScoresParams& p, const SequenceBounds& b, int query) {
    const int complete = query - b.query_begin - (p.kernel_size - 1);
    return complete < 0 ? 0 : min(static_cast<int>(p.by_kernel_stride.quotient(complete)) + 1, b.num_keys);
}

// The first of a lane's two rows of a tile; the other one is 8 behind it.
__device__ __forceinline__ int lane_row() {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
}

template <typename Traits>
using Accumulators = float[Traits::kAccumulators];

template <typename Traits>
__device__ __forceinline__ void add_probs(
    Accumulators<Traits>& probs, const Accumulators<Traits>& s, const float (&shift)[2], float scale_log2) {
#pragma unroll
    for (int x = 0; x < Traits::kAccumulators; ++x) probs[x] += exp2_approx(fmaf(s[x], scale_log2, -shift[x / 2 % 2]));
}

// Windows that a row does not see, and those before the sequence's first, count nothing.
template <typename Traits>
__device__ __forceinline__ void mask_unseen(Accumulators<Traits>& probs, int window, const unsigned (&seen)[2]) {
    const int own = window + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int x = 0; x < Traits::kAccumulators; ++x)
        if (static_cast<unsigned>(own + x / 4 * 8 + x % 2) >= seen[x / 2 % 2]) probs[x] = 0.f;
}

// How many strides of the two windows of a pair lie in their block (x, y), and in the next one (z, w). Pairs kPairPeriod
// apart are alike.
constexpr int kPairPeriod = 8;

template <typename Traits>
__device__ __forceinline__ void fill_weights(float4* weights, const BlockScoresParams& p) {
    const int ratio = 1 << p.log2_ratio;
    static_assert(kPairPeriod * sizeof(float4) <= Traits::kWeightBytes && kPairPeriod <= Traits::kThreads);
    const int pair = threadIdx.x;
    if (pair < kPairPeriod) {
        const int left[2] = {ratio - 2 * pair % ratio, ratio - (2 * pair + 1) % ratio};  // strides to the block's end
        weights[pair] = make_float4(
            static_cast<float>(min(p.span, left[0])), static_cast<float>(min(p.span, left[1])),
            static_cast<float>(max(p.span - left[0], 0)), static_cast<float>(max(p.span - left[1], 0)));
    }
}

// Where a pair of a row stands in a warp's stage: four rows side by side do not meet in a bank.
template <typename Traits>
__device__ __forceinline__ int stage_index(int row, int pair) {
    return row * Traits::kPairs + (pair ^ row % 4 * 4);
}

// Scores of a tile of queries and the blocks of a warpgroup's tile, from the sums of P.
template <typename Traits>
__device__ __forceinline__ void store_scores(
    unsigned char* memory, const Accumulators<Traits>& probs, const BlockScoresParams& p, const Unit& unit,
    int first_query, int tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float4* weights = reinterpret_cast<const float4*>(memory + Traits::kWeightsOffset);
    float2* stage = reinterpret_cast<float2*>(memory + Traits::kStagesOffset + warp * Traits::kStageBytes);
    // A lane has four windows of a row, and so a block or a part of one.
    constexpr int kLanes = Traits::kTileK / 4, kAtOnce = 32 / kLanes, kSteps = Traits::kStageRows / kAtOnce;
    const TileBlocks tiles(p, Traits::kLog2TileK);
    const int lanes_a_block = (1 << p.log2_ratio) / 4, own = lane % kLanes;
    const int own_block = own >> (p.log2_ratio - 2), block = tiles.first_block(tile) + own_block;
    const bool wanted = own % lanes_a_block == 0 && own_block >= tiles.overlap && block < unit.num_blocks;
    const int64_t row_stride = static_cast<int64_t>(p.num_kv_heads) * p.scores_stride;
    const int row = lane / kLanes, first_row = first_query + warp % 4 * 16 + row;
    float* scores = p.scores + (first_row - p.query_begin) * row_stride +
                    static_cast<int64_t>(unit.kv_head) * p.scores_stride + block;
    const float4 weight[2] = {weights[lane % 4], weights[4 + lane % 4]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n) {
            const float4& w = weight[n % 2];
            const float x = probs[4 * n + 2 * i], y = probs[4 * n + 2 * i + 1];
            stage[stage_index<Traits>(lane / 4, 4 * n + lane % 4)] =
                make_float2(fmaf(x, w.x, y * w.y), fmaf(x, w.z, y * w.w));
        }
        __syncwarp();
        float score[kSteps], over[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const float4 two =
                *reinterpret_cast<const float4*>(stage + stage_index<Traits>(step * kAtOnce + row, 2 * own));
            score[step] = two.x + two.z;
            over[step] = two.y + two.w;
        }
        for (int apart = 1; apart < lanes_a_block; apart *= 2) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                score[step] += __shfl_xor_sync(~0u, score[step], apart);
                over[step] += __shfl_xor_sync(~0u, over[step], apart);
            }
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const float from_left = __shfl_up_sync(~0u, over[step], lanes_a_block);
            const int r = 8 * i + step * kAtOnce;
            if (wanted && first_row + r < unit.end_query)
                scores[r * row_stride] = tiles.overlap ? score[step] + from_left : score[step];
        }
        __syncwarp();
    }
}

// From the sums of all heads, which begin anew then.
template <typename Traits>
__device__ __forceinline__ void finish_tile(
    unsigned char* memory, Accumulators<Traits>& probs, const BlockScoresParams& p, const Unit& unit, int first_query) {
    const int warpgroup = threadIdx.x / 128, window = first_window<Traits>(p, unit, warpgroup);
    const auto seen_by = [&](int query) {
        return static_cast<unsigned>(seen_windows(p, unit.bounds, min(query, unit.end_query - 1)));
    };
    // The first row of all sees least.
    if (window < 0 || static_cast<unsigned>(window + Traits::kTileK) > seen_by(first_query)) {
        const int query = first_query + lane_row();
        mask_unseen<Traits>(probs, window, {seen_by(query), seen_by(query + 8)});
    }
    store_scores<Traits>(memory, probs, p, unit, first_query, unit.split * Traits::kWarpgroups + warpgroup);
#pragma unroll
    for (float& x : probs) x = 0.f;
}

// The items of a unit.
template <typename Traits>
__device__ __forceinline__ void run_unit(
    const Pipeline<Traits>& pipeline, unsigned first_item, int num_items, const Unit& unit, const Sm90Params& p) {
    using QueryTile = typename Traits::QueryTile;
    using KeyTile = typename Traits::KeyTile;
    constexpr int kSteps = Traits::kHeadDim / 16;
    const int warpgroup = threadIdx.x / 128, row = lane_row();
    const uint32_t keys = uniform_value(pipeline.keys(warpgroup));
    Accumulators<Traits> s, probs = {};
    int first_query = unit.first_query, heads_left = p.group_size;  // of the tile
    for (unsigned item = first_item; item < first_item + num_items; ++item) {
        pipeline.wait_queries(item);
        const uint32_t queries = uniform_value(pipeline.queries(item));
        pipeline.await_turn(warpgroup, item);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            wgmma_ss<typename Traits::T, Major::kSum, Major::kSum>(
                s, QueryTile::along_columns(queries, step), KeyTile::along_columns(keys, step), step > 0);
            if (step == kSteps * 3 / 4 - 1) wgmma_commit();
        }
        wgmma_commit();
        const float* normalisers = pipeline.normalisers(item);
        const float shift[2] = {normalisers[row], normalisers[row + 8]};
        wgmma_wait<1>();
        pipeline.pass_turn(warpgroup);  // early enough for the next one's products to come behind these
        wgmma_wait<0>();
        pipeline.arrive_queries_empty(item);
        add_probs<Traits>(probs, s, shift, p.softmax_scale_log2);
        if (uniform(--heads_left == 0)) {
            finish_tile<Traits>(pipeline.memory, probs, p, unit, first_query);
            first_query += Traits::kTileQ;
            heads_left = p.group_size;
        }
    }
}

template <typename Traits>
__device__ __forceinline__ void run_consumer(const Pipeline<Traits>& pipeline, const Sm90Params& p) {
    const TileBlocks tiles(p, Traits::kLog2TileK);
    const int warpgroup = threadIdx.x / 128;
    unsigned u = 0, item = 0;
    if (warpgroup == Traits::kWarpgroups - 1) pipeline.pass_turn(warpgroup);
    for_each_unit<Traits>(p, [&](const Unit& unit) {
        const int num_items = unit.num_tiles(Traits::kTileQ) * p.group_size;
        const int first_block = tiles.first_block(unit.split * Traits::kWarpgroups + warpgroup) + tiles.overlap;
        pipeline.wait_keys(warpgroup, u);
        if (uniform(first_block < unit.num_blocks)) {
            run_unit<Traits>(pipeline, item, num_items, unit, p);
        } else {
            for (unsigned i = item; i < item + num_items; ++i) {
                pipeline.await_turn(warpgroup, i);
                pipeline.pass_turn(warpgroup);
                pipeline.wait_queries(i);
                pipeline.arrive_queries_empty(i);
            }
        }
        pipeline.arrive_keys_empty(warpgroup);
        item += num_items;
        ++u;
    });
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) block_scores_sm90(const __grid_constant__ Sm90Params p) {
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    using State = typename Pipeline<Traits>::State;
    const Pipeline<Traits> pipeline = {*reinterpret_cast<State*>(memory + Traits::kStateOffset), memory};
    if (threadIdx.x == 0) pipeline.init();
    await_kernel_before();
    fill_weights<Traits>(reinterpret_cast<float4*>(memory + Traits::kWeightsOffset), p);
    __syncthreads();
    if (threadIdx.x >= Traits::kConsumers) {
        release_registers<Traits::kLoaderRegisters>();
        run_loader<Traits>(pipeline, p);
        return;
    }
    claim_registers<Traits::kRegisters>();
    run_consumer<Traits>(pipeline, p);
}

}  // namespace block_scores

// Items of a unit at least: warpgroups wait for its keys.
constexpr int kMinItems = 8;

template <typename T, int kHeadDim>
void launch_block_scores_sm90(const BlockScoresParams& params, cudaStream_t stream) {
    using Traits = BlockScoresTraits<T, kHeadDim>;
    block_scores::Sm90Params p = {
        params,
        make_tensor_map<T, typename Traits::QueryTile>(
            params.q, params.sequences.total_q, static_cast<int64_t>(params.num_kv_heads) * params.group_size,
            params.head_dim),
        make_tensor_map<T, typename Traits::KeyTile>(
            params.k, params.sequences.total_k, params.num_kv_heads, params.head_dim)};
    const int split_blocks = Traits::kWarpgroups * ((Traits::kTileK >> p.log2_ratio) - (p.span > 1));
    const int num_blocks = (p.query_end + p.block_size - 1) / p.block_size;  // no query of the chunk is in a later one
    p.run_tiles = std::max(1, kMinItems / p.group_size);
    p.num_splits = (num_blocks + split_blocks - 1) / split_blocks;
    // Numbers of units are ints.
    const int64_t most_runs = (p.query_end - p.query_begin) / Traits::kTileQ + static_cast<int64_t>(p.sequences.batch);
    if (most_runs * p.num_kv_heads * p.num_splits > INT32_MAX / 2)
        throw std::runtime_error("fsa: too many sequences, heads and blocks for one selection");
    const auto kernel = block_scores::block_scores_sm90<Traits>;
    const LaunchShape shape = {dim3(sm_count()), Traits::kThreads, Traits::kSharedBytes};
    launch("block_scores_sm90", kernel, shape, p, stream);
}

}  // namespace fsa
