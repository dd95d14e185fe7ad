// The partials that main left for the rows of a unit: how loaders gather them, and how they become part of O.
#pragma once

#include "device/slots.cuh"
#include "forward/shared_pipeline.cuh"
#include "forward/shared_softmax.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

// How a warp goes through the rows of the partials of a load: a lane has a row, or the rows of a query that come together, of
// which this is the first.
struct PartialRow {
    int row;      // of the unit
    int which;    // partial of the load
    int partial;  // of the row's scattered slots and their sub-blocks
    int slot;
};

// Calls f(row, the how manieth) for the lane's share, all lanes at the same time: `row.which` is kPartialsALoad behind the last.
template <typename Traits, typename F>
__device__ __forceinline__ void for_each_partial_row(const Geometry& g, int first, int log2_rows, F&& f) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int step = 0; step << (5 + log2_rows) < kPartialsALoad * Traits::kRows; ++step) {
        const int i = (step * 32 + lane) << log2_rows, which = min(i / Traits::kRows, kPartialsALoad);
        const int partial = first + which;
        f(PartialRow{i % Traits::kRows, which, partial, static_cast<int>(g.by_subs.quotient(partial))}, step);
    }
}

// Requests log-sum-exps and exponents of the partials of load n, those of every row of the unit from `first` on; a warp. They
// are there after cp_async_wait. Says which partials there are: bit i is the i-th of for_each_partial_row.
template <typename Traits>
__device__ __forceinline__ unsigned fetch_partial_scales(
    const Pipeline<Traits>& pipeline, int n, const Sm90Params& p, const Unit& unit, int first) {
    const Geometry& g = p.geometry;
    const float* const lse_partial = p.lse_partial + first_partial_row(g, unit.head);
    const int rows = 1 << p.log2_partial_rows;
    unsigned existing = 0;
    for_each_partial_row<Traits>(g, first, p.log2_partial_rows, [&](const PartialRow& r, int step) {
        if (r.which == kPartialsALoad) return;
        const UnitRow row = make_unit_row(g, unit, r.row);
        const int64_t query = static_cast<int64_t>(unit.kv_head) * g.sequences.total_q + row.query;
        const int block_id = r.slot < g.topk ? __ldg(p.topk_idx + query * g.topk + r.slot) : -1;
        const QuerySlots slots = make_query_slots(g, unit.head, row.query);
        const bool exists = row.exists() && partial_exists(g, slots, block_id, r.partial);
        PartialScales<Traits>& scales = pipeline.partial_scales(n, r.which);
        if (!exists) {
            scales.exponent[r.row] = kNoPartial;
            return;
        }
        existing |= 1u << step;
        const int64_t sub_block =
            static_cast<int64_t>(slots.first_cell + block_id) * g.subs + (r.partial - r.slot * g.subs);
        cp_async_4(shared_address(&scales.exponent[r.row]), p.value_exponent + sub_block);
        const float* const lse = lse_partial + row.partial_row + r.partial * g.group_size;
#pragma unroll 1
        for (int i = 0; i < rows; i += 2) cp_async_8(shared_address(&scales.lse[r.row + i]), lse + i);
    });
    cp_async_commit();
    return existing;
}

// Has the copy engine bring the partials of load n, whose scales have been requested, once its buffers are free; values_full is
// told to expect their bytes. Those of some neighbouring queries come at once where most of them have one: the engine's time is
// by the box. What comes along for the others, main did not write; add_partial does not look at it.
template <typename Traits>
__device__ __forceinline__ void copy_partials(
    const Pipeline<Traits>& pipeline, int n, const Sm90Params& p, const Unit& unit, int first, unsigned existing) {
    using Tile = typename Traits::PartialTile;
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32, box_queries = 1 << p.log2_box_queries;
    const uint32_t full = pipeline.own_barrier(pipeline.state.values_full, n);
    int bytes = 0;
    for_each_partial_row<Traits>(g, first, p.log2_partial_rows, [&](const PartialRow& r, int step) {
        const bool exists = existing >> step & 1;
        const unsigned of_box = __ballot_sync(~0u, exists) >> (lane & -box_queries);
        const bool wide = 2 * __popc(of_box & ((1u << box_queries) - 1)) > box_queries;
        if (!(wide ? lane % box_queries == 0 : exists)) return;
        const UnitRow row = make_unit_row(g, unit, r.row);
        const TensorMap& map = wide ? p.wide_partial_map : p.partial_map;
        const uint32_t to = pipeline.partial_tile(n, r.which) + r.row * Tile::kRowBytes;
#pragma unroll
        for (int panel = 0; panel < Traits::kHeadDim / Tile::kPanelColumns; ++panel) {
            tma_load_4d(
                to + panel * Tile::kPanelBytes, map, full, panel * Tile::kPanelColumns, row.group_head, r.partial,
                unit.head * g.num_queries + row.query_in_chunk);
        }
        bytes += (Traits::kHeadDim * 2 << p.log2_partial_rows) * (wide ? box_queries : 1);
    });
    cp_async_wait<0>();
    mbarrier_arrive_expect(full, bytes);
}

// O += weight * partial, of a warp's rows: 16 from `first_row` of the tile on, whose scales are those given.
template <typename Traits>
__device__ __forceinline__ void add_partial(
    Output<Traits>& o, OnlineSoftmax& softmax, uint32_t tile, const PartialScales<Traits>& scales, int log2_rows,
    int first_row) {
    const int lane = threadIdx.x % 32;
    float lse[2], weight[2];
    int exponent[2];
    uint32_t mask[2];  // what is in the tile where a row has no partial is of some other time
    bool any = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i + lane / 4;
        exponent[i] = scales.exponent[row >> log2_rows << log2_rows];
        const bool exists = exponent[i] != kNoPartial;
        lse[i] = exists ? scales.lse[row] : -INFINITY;
        mask[i] = exists ? ~0u : 0u;
        exponent[i] = exists ? exponent[i] : 0;
        any |= exists;
    }
    if (!__any_sync(~0u, any)) return;
    rescale<Traits>(o, move_references(softmax, lse));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float shift = finite_shift(softmax.reference[i]) + kHeadroom<typename Traits::T>;
        weight[i] = exp2_approx(lse[i] - shift);
        softmax.sum[i] += lane % 4 == 0 ? weight[i] : 0.f;  // the quad adds up
        weight[i] *= power_of_two(exponent[i]);
    }
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
        uint32_t words[4];
        ldmatrix_x4(words, tile + Traits::PartialTile::offset(first_row + lane % 16, 2 * step + lane / 16));
        float* const own = &o[step * 16 / Traits::kColumns][step * 16 % Traits::kColumns / 2];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            const float2 x = HalfType<__half>::unpack(words[word] & mask[word % 2]);
            own[2 * word] = fmaf(weight[word % 2], x.x, own[2 * word]);
            own[2 * word + 1] = fmaf(weight[word % 2], x.y, own[2 * word + 1]);
        }
    }
}

}  // namespace forward_shared
}  // namespace fsa
