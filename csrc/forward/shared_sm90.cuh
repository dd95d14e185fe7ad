// The forward shared kernel for Hopper: query-outer over the blocks that a query tile shares, where main was KV-outer over
// the rest, whose partials become part of the result here. The unit of work is some rows of a query tile: their queries stay
// in the CTA, O in registers, with an online softmax over partials and shared blocks. So reading partials, which is all that
// reduce would do, goes on beside products. Rows of queries that did not select a block are masked: the tensor cores have
// room for them, memory has not. Loaders (forward/shared_loader.cuh) bring what is needed.
#pragma once

#include "device/softmax.cuh"
#include "forward/query_stage.cuh"
#include "forward/query_tile.cuh"
#include "forward/shared.h"
#include "forward/shared_loader.cuh"
#include "forward/shared_partials.cuh"
#include "forward/shared_pipeline.cuh"
#include "forward/shared_sm90_traits.h"
#include "forward/shared_softmax.cuh"
#include "forward/shared_units.cuh"
#include "host/tensor_map.h"
#include "launch.h"

namespace fsa {
namespace forward_shared {

// Q of a warp as A fragments, for head_dims whose Q fits into registers beside S, P and O.
template <typename Traits>
using HeldQueries = uint32_t[Traits::kHeldQuerySteps][4];

template <typename Traits>
__device__ __forceinline__ void load_query_fragments(HeldQueries<Traits>& q, uint32_t stage) {
    if constexpr (Traits::kHoldsQueries) {
#pragma unroll
        for (int step = 0; step < Traits::kHeldQuerySteps; ++step)
            ldmatrix_x4(q[step], Traits::Stage::lane_chunk(stage, step));
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

// Normalises O, puts it into the stage, and log-sum-exps into memory.
template <typename Traits>
__device__ __forceinline__ void finish_rows(
    uint32_t stage, Output<Traits>& o, const OnlineSoftmax& softmax, const ForwardSharedParams& p, const Unit& unit,
    const UnitRow& row) {
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    float scale[2], lse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(softmax.sum[i]);
        scale[i] = reciprocal_or_zero(sum);
        lse[i] = log2_sum_exp(finite_shift(softmax.reference[i]) + kHeadroom<typename Traits::T>, sum) * kLn2;
    }
#pragma unroll
    for (int pass = 0; pass < Traits::kPasses; ++pass) {
#pragma unroll
        for (int i = 0; i < Traits::kColumns / 2; ++i) o[pass][i] *= scale[i / 2 % 2];
        output_to_stage<typename Traits::T, Traits::kHeadDim, Traits::kColumns>(
            stage, o[pass], pass * Traits::kColumns);
    }
    // Lane i < 16 stores that of row i, which the quad of row i % 8 has as its row i / 8.
    const int from = lane % 8 * 4;
    const float lse_0 = __shfl_sync(~0u, lse[0], from), lse_1 = __shfl_sync(~0u, lse[1], from);
    const int64_t head = static_cast<int64_t>(unit.kv_head) * g.group_size + row.group_head;
    if (lane < 16 && row.exists()) p.lse[head * g.sequences.total_q + row.query] = lane < 8 ? lse_0 : lse_1;
}

// What inf and NaN among the values of the unit's blocks contribute to a warp's rows of O, which are in the stage.
template <typename Traits>
__device__ __forceinline__ void restore_unit(
    typename Traits::T* stage, const ForwardSharedParams& p, const Unit& unit, const UnitRow& row) {
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
            row_pointer<typename Traits::T>(p.v, block.key_token, unit.kv_head), p.v.token_stride, block.num_keys(),
            g.head_dim, row_in_block,
            [&](int r, int, int column) { return stage + Traits::Stage::Layout::offset(r, column / 8) / 2; });
    }
}

template <typename Traits>
__device__ __forceinline__ void store_rows(
    uint32_t stage, const ForwardSharedParams& p, const Unit& unit, const UnitRow& row) {
    using Stage = typename Traits::Stage;
    using T = typename Traits::T;
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    const int64_t num_heads = static_cast<int64_t>(p.num_kv_heads) * g.group_size;
    const int64_t head = static_cast<int64_t>(unit.kv_head) * g.group_size + row.group_head;
    const uint64_t own =
        reinterpret_cast<uint64_t>(static_cast<T*>(p.out) + (row.query * num_heads + head) * g.head_dim);
    const unsigned existing = __ballot_sync(~0u, row.exists());
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * Stage::kChunks / 32; ++i) {
        const int tile_row = (i * 32 + lane) / Stage::kChunks, chunk = (i * 32 + lane) % Stage::kChunks;
        T* const out = reinterpret_cast<T*>(__shfl_sync(~0u, own, tile_row));
        const uint4 x = load_shared_16(stage + Stage::Layout::offset(tile_row, chunk));
        store_global_16(out + chunk * 8, x, (existing >> tile_row & 1) && chunk * 8 < g.head_dim);
    }
}

// What a warpgroup has done.
struct Progress {
    int loads = 0;
    int turns = 0;  // of products
    int units = 0;
};

// O from the partials of the unit's rows: of `index`, from the next load on. The load behind them is there when it is done.
template <typename Traits>
__device__ __forceinline__ void add_partials(
    const Pipeline<Traits>& pipeline, Progress& done, int index, int log2_rows, Output<Traits>& o,
    OnlineSoftmax& softmax) {
    auto& state = pipeline.state;
    const auto has_partials = [&](const Load<Traits>& load) { return load.unit == index && load.first_partial >= 0; };
    const int first_row = threadIdx.x / 32 * 16;
    for (int& n = done.loads; uniform(has_partials(pipeline.load(n)));) {
        // Not unrolled: warps that go from partials to keys and back wait for instructions (docs/performance.md).
#pragma unroll 1
        for (int i = 0; i < kPartialsALoad; ++i) {
            pipeline.wait(i == 0 ? state.keys_full : state.values_full, n);
            add_partial<Traits>(
                o, softmax, pipeline.partial_tile(n, i), pipeline.partial_scales(n, i), log2_rows, first_row);
            pipeline.arrive(i == 0 ? state.keys_empty : state.values_empty, n);
        }
        pipeline.wait(state.keys_landed, ++n);
    }
}

// O += softmax(Q K^T) V over the sub-blocks that a unit shares: of `index`, from the next load on. Returns whether any value
// was inf or NaN. The load behind them is there when it is done.
//
// O += P V of a load comes behind S of the next one, and runs while that becomes P: nothing that a warpgroup waits for
// but S. (FlashAttention-3, arXiv 2407.08608, section 3.2.)
template <typename Traits>
__device__ __forceinline__ bool attend(
    const Pipeline<Traits>& pipeline, Progress& done, int index, uint32_t stage, const UnitRow& row,
    float softmax_scale_log2, Output<Traits>& o, OnlineSoftmax& softmax) {
    const int warpgroup = threadIdx.x / 128;
    auto& state = pipeline.state;
    int &n = done.loads, &turn = done.turns;
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
        const Update<Traits> update = update_references<Traits>(softmax, s, last_visible, softmax_scale_log2);
        Probs<Traits> next_probs;  // those before are still being read
        exponentiate<Traits>(next_probs, softmax, s, update, softmax_scale_log2);
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

    load_query_fragments<Traits>(q, stage);
    pipeline.await_turn(warpgroup, turn++);
    begin_scores<Traits>(s, q, stage, pipeline.k_tile(n));
    pipeline.pass_turn(warpgroup);
    wgmma_commit();  // an empty batch where P V would be
    become_probs();
    for (++n; uniform(pipeline.load(n).unit == index); ++n) {
        load_query_fragments<Traits>(q, stage);
        pipeline.await_turn(warpgroup, turn++);
        begin_scores<Traits>(s, q, stage, pipeline.k_tile(n));
        begin_values();
        pipeline.pass_turn(warpgroup);
        become_probs();
        pipeline.arrive(state.values_empty, n - 1);
    }
    begin_values();
    wgmma_wait<0>();
    pipeline.arrive(state.values_empty, n - 1);
    return nonfinite_values;
}

// The unit whose first load is there, and so is the load behind its last one when it is done.
template <typename Traits>
__device__ __forceinline__ void run_unit(
    const Pipeline<Traits>& pipeline, unsigned char* memory, Progress& done, const Sm90Params& p) {
    const int warp = threadIdx.x / 32, u = done.units++;
    const uint32_t stage = pipeline.memory + pipeline.stage_offset(u, warp);
    const int index = pipeline.load(done.loads).unit;
    const Unit unit = make_unit<Traits>(p.geometry, index);
    const UnitRow row = make_unit_row(p.geometry, unit, warp * 16 + threadIdx.x % 16);

    Output<Traits> o = {};
    OnlineSoftmax softmax;
    bool nonfinite_values = false;
    add_partials<Traits>(pipeline, done, index, p.log2_partial_rows, o, softmax);
    pipeline.wait_queries(u);  // and the stage is O's from here on
    if (uniform(pipeline.load(done.loads).unit == index))
        nonfinite_values = attend<Traits>(pipeline, done, index, stage, row, p.softmax_scale_log2, o, softmax);

    finish_rows<Traits>(stage, o, softmax, p, unit, row);
    if (nonfinite_values) {
        __syncwarp();
        auto* rows = reinterpret_cast<typename Traits::T*>(memory + pipeline.stage_offset(u, warp));
        restore_unit<Traits>(rows, p, unit, row);
    }
    store_rows<Traits>(stage, p, unit, row);
    pipeline.arrive_queries_empty(u);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) forward_shared_sm90(const __grid_constant__ Sm90Params p) {
    unsigned char* memory = static_cast<unsigned char*>(dynamic_shared_memory());
    using State = typename Pipeline<Traits>::State;
    const Pipeline<Traits> pipeline = {
        *reinterpret_cast<State*>(memory + Traits::kStateOffset), shared_address(memory)};
    if (threadIdx.x == 0) pipeline.init();
    await_kernel_before();
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp >= Traits::kWarps) {
        if constexpr (Traits::kHoldsQueries) release_registers<Traits::kLoaderRegisters>();
        run_loader<Traits>(pipeline, warp - Traits::kWarps, p);
        return;
    }
    if constexpr (Traits::kHoldsQueries) claim_registers<Traits::kRegisters>();
    if (warp >= 4) pipeline.pass_turn(1);
    Progress done;
    pipeline.wait(pipeline.state.keys_landed, 0);
    while (uniform(pipeline.load(done.loads).unit >= 0)) run_unit<Traits>(pipeline, memory, done, p);
}

}  // namespace forward_shared

template <typename T, int kHeadDim>
void launch_forward_shared_sm90(const ForwardSharedParams& p, cudaStream_t stream) {
    using Traits = ForwardSharedTraits<T, kHeadDim>;
    const Geometry& g = p.geometry;
    const auto map = [&](const RowTensor& tensor) {
        return make_tensor_map<T, typename Traits::Box>(tensor, g.sequences.total_k, p.num_kv_heads, g.head_dim);
    };
    // Boxes of partials: of one query, and of several where one such has all heads of a group.
    int log2_rows = 0, log2_queries = 0;
    while (g.group_size % (2 << log2_rows) == 0 && 2 << log2_rows <= Traits::kRows) ++log2_rows;
    while (g.group_size == 1 << log2_rows && 2 << (log2_rows + log2_queries) <= Traits::kRows) ++log2_queries;
    const int log2_few = min(log2_queries, 3);
    const auto partial_map = [&](int queries) {
        return make_partial_map<typename Traits::PartialTile>(p.o_partial, g, 1 << log2_rows, queries);
    };
    const forward_shared::Sm90Params params = {
        p,         map(p.k), map(p.v),    partial_map(1), partial_map(1 << log2_few), partial_map(1 << log2_queries),
        log2_rows, log2_few, log2_queries};
    const auto kernel = forward_shared::forward_shared_sm90<Traits>;
    launch("forward_shared_sm90", kernel, {dim3(sm_count()), Traits::kThreads, Traits::kSharedBytes}, params, stream);
}

}  // namespace fsa
