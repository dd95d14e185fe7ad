// The partials that main left for the rows of a unit: how loaders have them copied, and how they become part of O.
#pragma once

#include "device/slots.cuh"
#include "forward/shared_pipeline.cuh"
#include "forward/shared_softmax.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

// Has the copy engine bring one of the partials of a load; a warp. A lane looks after pieces: rows of a query that come
// together, 2^log2_partial_rows of them.
//
// Partials wait for the instructions of this warp more than for memory, so nothing but the copies themselves comes between a
// free buffer and these: which partials there are and how they are copied is found out before.
template <typename Traits>
struct PartialCopier {
    static constexpr int kPieces = (Traits::kRows / kSharedHeads + 31) / 32;  // a lane's, at most
    using Tile = typename Traits::PartialTile;

    struct Piece {
        UnitRow first;  // row
        QuerySlots slots;
    };

    const Pipeline<Traits>& pipeline;
    const Sm90Params& p;
    int which;  // of the partials of a load
    int index = -1;
    Unit unit;
    Piece pieces[kPieces];
    int block_ids[kPieces];    // of the unit's partial that comes next
    int box_queries[kPieces];  // that a copy brings, beginning at the piece; 0: there is none

    // Row of the unit where a piece of the lane begins. Behind the last one: not below kRows.
    __device__ __forceinline__ int first_row(int piece) const {
        return (piece * 32 + static_cast<int>(threadIdx.x) % 32) << p.log2_partial_rows;
    }
    __device__ __forceinline__ void look_up_unit(int new_index) {
        const Geometry& g = p.geometry;
        index = new_index;
        unit = make_unit<Traits>(g, index);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int row = first_row(i);
            pieces[i].first = make_unit_row(g, unit, min(row, Traits::kRows - 1));
            if (row >= Traits::kRows) pieces[i].first.partial_row = -1;
            pieces[i].slots = make_query_slots(g, unit.head, pieces[i].first.query);
        }
    }
    __device__ __forceinline__ void look_up_blocks(int partial) {
        const Geometry& g = p.geometry;
        const int slot = static_cast<int>(g.by_subs.quotient(partial));
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int64_t query = static_cast<int64_t>(unit.kv_head) * g.sequences.total_q + pieces[i].first.query;
            block_ids[i] = pieces[i].first.exists() && slot < g.topk ? __ldg(p.topk_idx + query * g.topk + slot) : -1;
        }
    }
    // Requests log-sum-exps and exponents of the partial whose blocks have been looked up, which are there after cp_async_wait,
    // and chooses its boxes.
    __device__ __forceinline__ void prepare(int partial, PartialScales<Traits>& scales) {
        const Geometry& g = p.geometry;
        const float* const lse_partial = p.lse_partial + first_partial_row(g, unit.head) + partial * g.group_size;
        const int sub = partial - static_cast<int>(g.by_subs.quotient(partial)) * g.subs;
        unsigned existing[kPieces];  // bit i: the piece of lane i has it
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const Piece& piece = pieces[i];
            const int row = first_row(i);
            const bool exists = partial_exists(g, piece.slots, block_ids[i], partial);
            existing[i] = __ballot_sync(~0u, exists);
            if (exists) {
                const int64_t sub_block = static_cast<int64_t>(piece.slots.first_cell + block_ids[i]) * g.subs + sub;
                cp_async_4(shared_address(&scales.exponent[row]), p.value_exponent + sub_block);
#pragma unroll 1
                for (int k = 0; k < 1 << p.log2_partial_rows; k += 2)
                    cp_async_8(shared_address(&scales.lse[row + k]), lse_partial + piece.first.partial_row + k);
            } else if (row < Traits::kRows) {
                scales.exponent[row] = kNoPartial;
            }
        }
        cp_async_commit();
        choose_boxes(existing);
    }
    // Neighbouring queries come at once where most of them have the partial: all of a unit, or a few. What comes along for the
    // others, main did not write, or wrote at some other time; add_partial does not look at it.
    __device__ __forceinline__ void choose_boxes(const unsigned (&existing)[kPieces]) {
        const int lane = threadIdx.x % 32, few = 1 << p.log2_few_queries, all = 1 << p.log2_unit_queries;
        int count = 0;
#pragma unroll
        for (const unsigned x : existing) count += __popc(x);
        const bool together = all << p.log2_partial_rows == Traits::kRows && 2 * count > all;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const unsigned of_few = existing[i] >> (lane & -few) & ((1u << few) - 1);
            if (together) {
                box_queries[i] = i == 0 && lane == 0 ? all : 0;
            } else if (2 * __popc(of_few) > few) {
                box_queries[i] = (lane & (few - 1)) == 0 ? few : 0;
            } else {
                box_queries[i] = existing[i] >> lane & 1;
            }
        }
    }
    // Returns the bytes to come for the lane.
    __device__ __forceinline__ int start_copies(int partial, uint32_t tile, uint32_t full) const {
        int queries = 0;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            if (box_queries[i] == 0) continue;
            queries += box_queries[i];
            const UnitRow& row = pieces[i].first;
            const TensorMap& map = box_queries[i] >> p.log2_unit_queries  ? p.unit_partial_map
                                   : box_queries[i] >> p.log2_few_queries ? p.few_partial_map
                                                                          : p.partial_map;
#pragma unroll
            for (int panel = 0; panel < Traits::kHeadDim / Tile::kPanelColumns; ++panel) {
                tma_load_4d(
                    tile + first_row(i) * Tile::kRowBytes + panel * Tile::kPanelBytes, map, full,
                    panel * Tile::kPanelColumns, row.group_head, partial,
                    unit.head * p.geometry.num_queries + row.query_in_chunk);
            }
        }
        return (queries * Traits::kHeadDim * 2) << p.log2_partial_rows;
    }

    // The partial of load n, once await_buffer() has found its buffer free; `full` is told to expect its bytes.
    template <typename F>
    __device__ __forceinline__ void copy(
        int n, const Load<Traits>& load, uint64_t (&full)[Traits::kBuffers], F&& await_buffer) {
        const int partial = load.first_partial + which;
        if (load.unit != index) {
            look_up_unit(load.unit);
            look_up_blocks(partial);
        }
        prepare(partial, pipeline.partial_scales(n, which));
        look_up_blocks(partial + kPartialsALoad);
        await_buffer();
        const uint32_t barrier = pipeline.own_barrier(full, n);
        const int bytes = start_copies(partial, pipeline.partial_tile(n, which), barrier);
        cp_async_wait<0>();
        mbarrier_arrive_expect(barrier, bytes);
    }
};

// O += weight * partial, of a warp's rows: 16 from `first_row` of the tile on, whose scales are those given.
template <typename Traits>
__device__ __forceinline__ void add_partial(
    Output<Traits>& o, OnlineSoftmax& softmax, uint32_t tile, const PartialScales<Traits>& scales, int log2_rows,
    int first_row) {
    const int lane = threadIdx.x % 32;
    float lse[2], weight[2];
    int exponent[2];
    uint32_t mask[2];  // what is in the tile where a row has no partial is of some other time, or came along unwritten
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
