// The forward shared kernel for Hopper: query-outer over the blocks that a query tile shares, where main is KV-outer over
// the rest. The unit of work is some rows of a query tile: their queries stay in the CTA, O in registers over all
// shared blocks, with an online softmax, and one partial a row is left. Rows of queries that did not select a block are
// masked: the tensor cores have room for them, memory has not. Loaders (forward/shared_loader.cuh) bring what is needed.
#pragma once

#include <type_traits>

#include "device/softmax.cuh"
#include "forward/query_stage.cuh"
#include "forward/query_tile.cuh"
#include "forward/shared.h"
#include "forward/shared_loader.cuh"
#include "forward/shared_sm90_traits.h"
#include "forward/shared_units.cuh"
#include "host/tensor_map.h"
#include "launch.h"

namespace fsa {
namespace forward_shared {

using namespace forward_main;

template <typename Traits>
using Output = float[Traits::kPasses][Traits::kColumns / 2];

// Of the two rows of a lane. A lane sums its own columns; the quad adds up at the end.
struct OnlineSoftmax {
    float reference[2] = {-INFINITY, -INFINITY};  // what exponents count from, log2: near the largest score so far
    float sum[2] = {0.f, 0.f};
};

// Scores may exceed the reference by this much, log2, before O is scaled to a new one.
constexpr float kSlack = 2.f;

// log2 of what P is divided by: O sums up to 2^17 values (512 slots of 256 keys) with factors up to 2^kSlack before it is
// normalised, and those of bf16 reach 2^128.
template <typename T>
constexpr float kHeadroom = std::is_same_v<T, __half> ? 0.f : 17.f + kSlack;

// What a load asks of a lane's two rows.
template <typename Traits>
struct Update {
    bool shares[2][Traits::kSubBlocks];  // the row's query shares the sub-block
    bool moves;                          // the reference of some row of the warp moves
    float kept[2];                       // what is left of sums so far, if it does
};

// mask_invisible (query_tile.cuh) for every sub-block of a load. Not one function: main on sm_80 has no register to spare, and
// spills if it shares these loops.
template <typename Traits>
__device__ __forceinline__ void mask_invisible_keys(Scores<Traits>& s, const int (&last_visible)[Traits::kSubBlocks]) {
    constexpr int kKeys = Traits::kSubBlockKeys;
    const int lane = threadIdx.x % 32;
    bool any = false;
    for (const int last : last_visible) any |= last >= 0 && last < kKeys - 1;
    if (!__any_sync(~0u, any)) return;
#pragma unroll
    for (int sub = 0; sub < Traits::kSubBlocks; ++sub) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int last = __shfl_sync(~0u, last_visible[sub], 8 * i + lane / 4) - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int x = 0; x < 2; ++x)
                    if (n * 8 + x > last) s[0][sub * (kKeys / 8) + n][2 * i + x] = -INFINITY;
        }
    }
}

// Moves the references to where the rows' scores are.
template <typename Traits>
__device__ __forceinline__ Update<Traits> update_references(
    OnlineSoftmax& softmax, const Scores<Traits>& s, const int (&last_visible)[Traits::kSubBlocks], float scale_log2) {
    constexpr int kTiles = Traits::kSubBlockKeys / 8;
    Update<Traits> update = {};
    bool moves = false;
    float maximum[2] = {-INFINITY, -INFINITY};  // of the lane's own columns
#pragma unroll
    for (int sub = 0; sub < Traits::kSubBlocks; ++sub) {
        const unsigned sharing = __ballot_sync(~0u, last_visible[sub] >= 0) >> threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float largest = s[0][sub * kTiles][2 * i];
#pragma unroll
            for (int n = sub * kTiles; n < (sub + 1) * kTiles; ++n)
                largest = fmaxf(largest, fmaxf(s[0][n][2 * i], s[0][n][2 * i + 1]));
            update.shares[i][sub] = sharing >> 8 * i & 1;
            // An addition, of which the compiler makes no branch.
            maximum[i] = fmaxf(maximum[i], largest + (update.shares[i][sub] ? 0.f : -INFINITY));
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) moves |= maximum[i] * scale_log2 > softmax.reference[i] + kSlack;
    update.moves = __any_sync(~0u, moves);
    if (update.moves) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float reference = fmaxf(softmax.reference[i], quad_max(maximum[i]) * scale_log2);
            update.kept[i] = exp2_approx(softmax.reference[i] - finite_shift(reference));
            softmax.reference[i] = reference;
            softmax.sum[i] *= update.kept[i];
        }
    }
    return update;
}

// P = 2^(S - reference - kHeadroom), not normalised, which sums take up: while products are on their way, and not behind
// them, where the compiler would like to have it.
template <typename Traits>
__device__ __forceinline__ void exponentiate(
    Probs<Traits>& probs, OnlineSoftmax& softmax, const Scores<Traits>& s, const Update<Traits>& update,
    float scale_log2) {
    constexpr int kTiles = Traits::kSubBlockKeys / 8;
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) shift[i] = finite_shift(softmax.reference[i]) + kHeadroom<typename Traits::T>;
#pragma unroll
    for (int sub = 0; sub < Traits::kSubBlocks; ++sub) {
        float sums[2][2] = {};
#pragma unroll
        for (int n = sub * kTiles; n < (sub + 1) * kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = exp2_approx(fmaf(s[0][n][2 * i], scale_log2, -shift[i])),
                            y = exp2_approx(fmaf(s[0][n][2 * i + 1], scale_log2, -shift[i]));
                sums[i][0] += x;
                sums[i][1] += y;
                probs[0][n][i] = computed_here(HalfType<typename Traits::T>::pack(x, y));
            }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            softmax.sum[i] += computed_here(update.shares[i][sub] ? sums[i][0] + sums[i][1] : 0.f);
    }
}

// O as far as it goes counted from the new references.
template <typename Traits>
__device__ __forceinline__ void rescale(Output<Traits>& o, const Update<Traits>& update) {
    if (!update.moves) return;
#pragma unroll
    for (int pass = 0; pass < Traits::kPasses; ++pass)
#pragma unroll
        for (int x = 0; x < Traits::kColumns / 2; ++x) o[pass][x] *= update.kept[x / 2 % 2];
}

// P as operand of the next product. Rows that do not share a sub-block get zeros by a choice, not by their scores: those may
// be NaN.
template <typename Traits>
__device__ __forceinline__ void choose_shared(
    Probs<Traits>& operand, const Probs<Traits>& probs, const Update<Traits>& update) {
    constexpr int kTiles = Traits::kSubBlockKeys / 8;
#pragma unroll
    for (int n = 0; n < Traits::kTileK / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) operand[0][n][i] = update.shares[i][n / kTiles] ? probs[0][n][i] : 0;
}

// Q of a warp as A fragments, for head_dims whose Q fits into registers beside S, P and O.
template <typename Traits>
using HeldQueries = uint32_t[Traits::kHeldQuerySteps][4];

template <typename Traits>
__device__ __forceinline__ void load_query_fragments(HeldQueries<Traits>& q, uint32_t stage) {
    if constexpr (Traits::kHoldsQueries) {
#pragma unroll
        for (int step = 0; step < Traits::kHeldQuerySteps; ++step)
            ldmatrix_x4(q[step], Traits::Stage::lane_chunk(stage) + step * 32);
    }
}

// S = Q K^T, a batch that the caller waits for.
template <typename Traits>
__device__ __forceinline__ void begin_scores(
    Scores<Traits>& s, const HeldQueries<Traits>& q, uint32_t stage, uint32_t k_tile) {
    if constexpr (Traits::kHoldsQueries) {
        auto& accumulators = reinterpret_cast<float (&)[Traits::kTileK / 2]>(s);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kHeldQuerySteps; ++step) {
            wgmma_rs<typename Traits::T, Major::kSum>(
                accumulators, q[step], Traits::Tile::along_columns(k_tile, step), step > 0);
        }
        wgmma_commit();
    } else {
        compute_scores_sm90<Traits>(s, stage, k_tile);
    }
}

// O += P V, a batch that the caller waits for.
template <typename Traits>
__device__ __forceinline__ void begin_pv(Output<Traits>& o, const Probs<Traits>& probs, uint32_t v_tile) {
    wgmma_fence();
#pragma unroll
    for (int pass = 0; pass < Traits::kPasses; ++pass)
        compute_pv_columns<Traits, Traits::kColumns>(o[pass], probs, v_tile, pass * Traits::kColumns, true);
    wgmma_commit();
}

// The power of two by which a row of O is divided, so that fp16 holds it: the row's largest element comes near 2^15.
__device__ __forceinline__ int row_exponent(float largest) {
    return largest > 0.f && largest < INFINITY ? min(max(ilogbf(largest) - 14, -100), 113) : 0;
}

// Normalises O, puts it into the stage, and log-sum-exps and exponents into memory.
template <typename Traits>
__device__ __forceinline__ void finish_rows(
    uint32_t stage, Output<Traits>& o, const OnlineSoftmax& softmax, const ForwardSharedParams& p, int head,
    const QueryRow& row) {
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    float scale[2], lse[2];
    int exponent[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(softmax.sum[i]), inverse = reciprocal_or_zero(sum);
        float largest = 0.f;
#pragma unroll
        for (int pass = 0; pass < Traits::kPasses; ++pass)
#pragma unroll
            for (int x = 2 * i; x < Traits::kColumns / 2; x += 4)
                largest = fmaxf(largest, fmaxf(fabsf(o[pass][x]), fabsf(o[pass][x + 1])));
        exponent[i] = row_exponent(quad_max(largest) * inverse);
        scale[i] = inverse * power_of_two(-exponent[i]);
        lse[i] = log2_sum_exp(finite_shift(softmax.reference[i]) + kHeadroom<typename Traits::T>, sum);
    }
#pragma unroll
    for (int pass = 0; pass < Traits::kPasses; ++pass) {
#pragma unroll
        for (int i = 0; i < Traits::kColumns / 2; ++i) o[pass][i] *= scale[i / 2 % 2];
        output_to_stage<Traits::kHeadDim, Traits::kColumns>(stage, o[pass], pass * Traits::kColumns);
    }
    // Lane i < 16 stores those of row i, which the quad of row i % 8 has as its row i / 8.
    const int from = lane % 8 * 4, which = lane / 8 % 2;
    const float lse_0 = __shfl_sync(~0u, lse[0], from), lse_1 = __shfl_sync(~0u, lse[1], from);
    const int exponent_0 = __shfl_sync(~0u, exponent[0], from), exponent_1 = __shfl_sync(~0u, exponent[1], from);
    if (lane < 16 && row.partial_row >= 0) {
        p.lse_partial[first_partial_row(g, head) + row.partial_row] = which == 0 ? lse_0 : lse_1;
        const int64_t query = static_cast<int64_t>(head) * g.num_queries + (row.query - g.query_begin);
        p.shared_exponent[query * g.group_size + row.group_head] = which == 0 ? exponent_0 : exponent_1;
    }
}

// What inf and NaN among the values of the unit's blocks contribute to a warp's rows of O, which are in the stage.
template <typename Traits>
__device__ __forceinline__ void restore_unit(
    __half* stage, const ForwardSharedParams& p, const Unit& unit, const UnitRow& row) {
    const Geometry& g = p.geometry;
    const int subs = g.block_size / Traits::kSubBlockKeys, head_and_tile = unit.head * p.shared.num_tiles + unit.tile;
    const int4* entries = p.shared.blocks + static_cast<int64_t>(head_and_tile) * p.shared.max_blocks;
    const int end = __ldg(p.shared.counts + head_and_tile) * subs;
#pragma unroll 1
    for (int i = 0; i < end; ++i) {
        const SharedSubBlock block = make_sub_block<Traits>(g, __ldg(entries + i / subs), i % subs);
        QueryRow row_in_block = row;
        row_in_block.last_visible = last_visible_in(block, row);
        restore_nonfinite_values<Traits>(
            row_pointer<typename Traits::T>(p.v, block.key_token, unit.kv_head), p.v.token_stride, block.num_keys,
            g.head_dim, row_in_block, [&](int r, int) { return stage + r * Traits::Stage::kRowPitch / 2; });
    }
}

// A unit from load n on: its partials. Returns the first load of the next unit.
//
// O += P V of a load comes behind S of the next one, and runs while that becomes P: nothing that a warpgroup waits for
// but S. (FlashAttention-3, arXiv 2407.08608, section 3.2.)
template <typename Traits>
__device__ __forceinline__ int run_unit(
    const Pipeline<Traits>& pipeline, unsigned char* memory, int n, int u, const ForwardSharedParams& p) {
    const Geometry& g = p.geometry;
    const int warp = threadIdx.x / 32, warpgroup = warp / 4;
    const uint32_t stage = pipeline.memory + pipeline.stage_offset(u, warp);
    const int index = pipeline.load(n).unit;
    const Unit unit = make_unit<Traits>(g, index);
    UnitRow row = make_unit_row(g, unit, warp * 16 + threadIdx.x % 16);
    // Asked for now, looked at behind the loop.
    const int slot = __ldg(p.shared.slots + static_cast<int64_t>(unit.head) * g.num_queries + row.query_in_chunk);

    auto& state = pipeline.state;
    Output<Traits> o = {};
    OnlineSoftmax softmax;
    Scores<Traits> s;
    Probs<Traits> probs;
    HeldQueries<Traits> q;
    bool nonfinite_values = false;
    // S of load n. The next load is there when it is done.
    const auto become_probs = [&] {
        int last_visible[Traits::kSubBlocks];
#pragma unroll
        for (int sub = 0; sub < Traits::kSubBlocks; ++sub)
            last_visible[sub] = last_visible_in(pipeline.load(n).blocks[sub], row);
        wgmma_wait<1>();
        pipeline.arrive(state.keys_empty, n);
        mask_invisible_keys<Traits>(s, last_visible);
        const Update<Traits> update = update_references<Traits>(softmax, s, last_visible, p.softmax_scale_log2);
        Probs<Traits> next_probs;  // those before are still being read
        exponentiate<Traits>(next_probs, softmax, s, update, p.softmax_scale_log2);
        // Between the exponentials and the wait, which ptxas would else move before them.
        pipeline.wait(state.keys_landed, n + 1);
        wgmma_wait<0>();
        rescale<Traits>(o, update);
        choose_shared<Traits>(probs, next_probs, update);
    };
    // P V of the load before.
    const auto begin_values = [&] {
        pipeline.wait(state.values_full, n - 1);
        nonfinite_values |= pipeline.has_nonfinite_values(n - 1);
        begin_pv<Traits>(o, probs, pipeline.v_tile(n - 1));
    };

    pipeline.wait_queries(u);
    load_query_fragments<Traits>(q, stage);
    pipeline.await_turn(warpgroup, n);
    begin_scores<Traits>(s, q, stage, pipeline.k_tile(n));
    pipeline.pass_turn(warpgroup);
    wgmma_commit();  // an empty batch where P V would be
    become_probs();
    for (++n; uniform(pipeline.load(n).unit == index); ++n) {
        load_query_fragments<Traits>(q, stage);
        pipeline.await_turn(warpgroup, n);
        begin_scores<Traits>(s, q, stage, pipeline.k_tile(n));
        begin_values();
        pipeline.pass_turn(warpgroup);
        become_probs();
        pipeline.arrive(state.values_empty, n - 1);
    }
    begin_values();
    wgmma_wait<0>();
    pipeline.arrive(state.values_empty, n - 1);

    if (row.exists && slot >= 0)
        row.partial_row = (row.query_in_chunk * g.topk + slot) * g.subs * g.group_size + row.group_head;
    finish_rows<Traits>(stage, o, softmax, p, unit.head, row);
    if (nonfinite_values) {
        __syncwarp();
        restore_unit<Traits>(reinterpret_cast<__half*>(memory + pipeline.stage_offset(u, warp)), p, unit, row);
    }
    store_partials<Traits::kHeadDim>(
        stage, p.o_partial + first_partial_row(g, unit.head) * g.head_dim, g.head_dim, row);
    pipeline.arrive_queries_empty(u);
    return n;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) forward_shared_sm90(const __grid_constant__ Sm90Params p) {
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    using State = typename Pipeline<Traits>::State;
    const Pipeline<Traits> pipeline = {
        *reinterpret_cast<State*>(memory + Traits::kStateOffset), shared_address(memory)};
    if (threadIdx.x == 0) pipeline.init();
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp >= Traits::kWarps) {
        if constexpr (Traits::kHoldsQueries) release_registers<Traits::kLoaderRegisters>();
        run_loader<Traits>(pipeline, warp - Traits::kWarps, p);
        return;
    }
    if constexpr (Traits::kHoldsQueries) claim_registers<Traits::kRegisters>();
    if (warp >= 4) pipeline.pass_turn(1);
    int n = 0;
    for (int u = 0;; ++u) {
        pipeline.wait(pipeline.state.keys_landed, n);
        if (uniform(pipeline.load(n).unit < 0)) return;
        n = run_unit<Traits>(pipeline, memory, n, u, p);
    }
}

}  // namespace forward_shared

template <typename T, int kHeadDim>
void launch_forward_shared_sm90(const ForwardSharedParams& p, cudaStream_t stream) {
    using Traits = ForwardSharedTraits<T, kHeadDim>;
    const auto map = [&](const RowTensor& tensor) {
        return make_tensor_map<T, typename Traits::Box>(
            tensor, p.geometry.sequences.total_k, p.num_kv_heads, p.geometry.head_dim);
    };
    const forward_shared::Sm90Params params = {p, map(p.k), map(p.v)};
    const auto kernel = forward_shared::forward_shared_sm90<Traits>;
    launch("forward_shared_sm90", kernel, {dim3(sm_count()), Traits::kThreads, Traits::kSharedBytes}, params, stream);
}

}  // namespace fsa
