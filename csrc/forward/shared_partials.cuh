// The partials that main left for the rows of a unit: how loaders gather them, and how they become part of O.
#pragma once

#include "device/slots.cuh"
#include "device/wgmma.cuh"
#include "forward/shared_pipeline.cuh"
#include "forward/shared_softmax.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

// The partials of load n, those of every row of the unit from `first` on. A warp: a lane a query, or as many of its heads as
// come together. The copy engine brings the partials, whose bytes values_full is told to expect: those of some neighbouring
// queries at once where all of them have one, for its time is by the box. While these are on their way, so are log-sum-exps
// and exponents, which are there when the warp has arrived.
template <typename Traits>
__device__ __forceinline__ void gather_partials(
    const Pipeline<Traits>& pipeline, int n, const Sm90Params& p, const Unit& unit, int first) {
    constexpr int kRows = Traits::kRows, kEnd = kPartialsALoad * kRows;
    using Tile = typename Traits::PartialTile;
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32, log2_rows = p.log2_partial_rows, box_queries = 1 << p.log2_box_queries;
    const uint32_t full = pipeline.own_barrier(pipeline.state.values_full, n);
    const int32_t* const counts = p.shared.scattered_counts + static_cast<int64_t>(unit.head) * g.num_queries;
    const auto scales_of = [&](int i) -> PartialScales<Traits>& { return pipeline.partial_scales(n, i / kRows); };
    const auto load_block = [&](const UnitRow& row, int slot) {
        const int64_t query = static_cast<int64_t>(unit.kv_head) * g.sequences.total_q + row.query;
        return __ldg(p.topk_idx + query * g.topk + slot);
    };
    int bytes = 0;
#pragma unroll 1
    for (int step = 0; step < kEnd; step += 32 << log2_rows) {
        const int i = step + (lane << log2_rows);
        const int partial = first + i / kRows, slot = g.by_subs.quotient(partial);
        const UnitRow row = make_unit_row(g, unit, i % kRows);
        bool exists = i < kEnd && row.exists() && slot < __ldg(counts + row.query_in_chunk);
        if (exists && g.subs > 1) {  // the query may see some of a block's sub-blocks only
            const SlotRow slots = make_slot_row(g, unit.head, row.query, row.partial_row);
            exists = partial_exists(g, slots, load_block(row, slot), partial);
        }
        const unsigned existing = __ballot_sync(~0u, exists) >> (lane & -box_queries);
        const bool wide = ((existing + 1) & ((1u << box_queries) - 1)) == 0;
        if (wide ? lane % box_queries == 0 : exists) {
            const TensorMap& map = wide ? p.wide_partial_map : p.partial_map;
            const uint32_t to = pipeline.partial_tile(n, i / kRows) + i % kRows * Tile::kRowBytes;
#pragma unroll
            for (int panel = 0; panel < Traits::kHeadDim / Tile::kPanelColumns; ++panel) {
                tma_load_4d(
                    to + panel * Tile::kPanelBytes, map, full, panel * Tile::kPanelColumns, row.group_head, partial,
                    unit.head * g.num_queries + row.query_in_chunk);
            }
            bytes += (Traits::kHeadDim * 2 << log2_rows) * (wide ? box_queries : 1);
        }
        if (i < kEnd) scales_of(i).exponent[i % kRows] = exists ? 0 : kNoPartial;
    }
    __syncwarp();
    const float* const lse_partial = p.lse_partial + first_partial_row(g, unit.head);
#pragma unroll 1
    for (int i = lane; i < kEnd; i += 32) {
        if (scales_of(i).exponent[i % kRows >> log2_rows << log2_rows] == kNoPartial) continue;
        const UnitRow row = make_unit_row(g, unit, i % kRows);
        cp_async_4(
            shared_address(&scales_of(i).lse[i % kRows]),
            lse_partial + row.partial_row + (first + i / kRows) * g.group_size);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane << log2_rows; i < kEnd; i += 32 << log2_rows) {
        int& exponent = scales_of(i).exponent[i % kRows];
        if (exponent == kNoPartial) continue;
        const int partial = first + i / kRows, slot = g.by_subs.quotient(partial), sub = partial - slot * g.subs;
        const UnitRow row = make_unit_row(g, unit, i % kRows);
        const SlotRow slots = make_slot_row(g, unit.head, row.query, row.partial_row);
        const int block = slots.first_cell + load_block(row, slot);
        cp_async_4(shared_address(&exponent), p.value_exponent + static_cast<int64_t>(block) * g.subs + sub);
    }
    cp_async_commit();
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
