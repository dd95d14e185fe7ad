// A warp's 16 query rows in shared memory and what passes through there on Hopper: Q in, as A fragments of a warpgroup's
// products; O out, as whole rows. Every request to L2 is thus for whole lines: fragments loaded and stored directly come
// in pieces of 64 bytes, and L2 ran out of requests first (docs/performance.md).
#pragma once

#include "device/convert.cuh"
#include "device/layout.h"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "device/wgmma_tile.h"
#include "device/work_item.cuh"
#include "forward/query_tile.cuh"

namespace fsa {
namespace forward_main {

// Swizzled rows. With 16 bytes between them ldmatrix and stmatrix would meet no bank twice, either, but L1 asks L2 twice for a
// sector of 32 bytes that a copy puts across two sectors of shared memory.
template <int kHeadDim>
struct QueryStage {
    using Layout = SwizzledTile<kHeadDim * 2>;
    static constexpr int kBytes = 16 * kHeadDim * 2;
    static constexpr int kChunks = kHeadDim / 8;

    // Where lane i points ldmatrix and stmatrix to, for columns 16 * step and on: 16 rows, two chunks. stage: a multiple of 128
    static __device__ __forceinline__ uint32_t lane_chunk(uint32_t stage, int step) {
        constexpr int kSteps = Layout::kFullPattern ? 4 : 2;  // among whose chunks the swizzle exchanges
        const int lane = threadIdx.x % 32;
        return ((stage + Layout::offset(lane % 16, lane / 16)) ^ (step % kSteps * 32)) + step / kSteps * kSteps * 32;
    }
};

// The rows of Q, asynchronously: lane i describes row i % 16. The caller commits. In main each of a query's blocks asks for
// them again, so L2 keeps them rather than the partials, which pass through it once. (Shared reads them once: there it makes
// no difference.)
template <typename T, int kHeadDim>
__device__ __forceinline__ void gather_queries(
    uint32_t stage, const Geometry& g, const RowTensor& q, int kv_head, const QueryRow& row) {
    using Stage = QueryStage<kHeadDim>;
    const int lane = threadIdx.x % 32, num_chunks = g.head_dim / 8;
    const uint64_t policy = evict_last_policy();
    // Not a uniform register: of a uniform shared address together with a policy, ptxas (CUDA 13.0) makes an illegal
    // instruction.
    stage = __shfl_sync(~0u, stage, 0);
    const T* own = row_pointer<T>(q, row.query, kv_head * g.group_size + row.group_head);
#pragma unroll
    for (int i = 0; i < 16 * Stage::kChunks / 32; ++i) {
        const int tile_row = (i * 32 + lane) / Stage::kChunks, chunk = (i * 32 + lane) % Stage::kChunks;
        const uint64_t address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(own), tile_row);
        const bool valid = chunk < num_chunks;
        cp_async_16(
            stage + Stage::Layout::offset(tile_row, chunk),
            reinterpret_cast<const T*>(address) + (valid ? chunk * 8 : 0), valid, policy);
    }
}

// S = Q K^T. Q is in registers 128 columns at a time; 64 where S has 128 keys of as many columns: more would spill.
template <typename Traits>
__device__ __forceinline__ void compute_scores_sm90(Scores<Traits>& s, uint32_t stage, uint32_t k_tile) {
    constexpr int kSteps = Traits::kHeadDim / 16, kMost = Traits::kTileK == 128 && Traits::kHeadDim == 128 ? 4 : 8,
                  kBatch = kSteps < kMost ? kSteps : kMost;
    auto& accumulators = reinterpret_cast<float (&)[Traits::kTileK / 2]>(s);
#pragma unroll
    for (int first = 0; first < kSteps; first += kBatch) {
        uint32_t q[kBatch][4];
#pragma unroll
        for (int i = 0; i < kBatch && first + i < kSteps; ++i)
            ldmatrix_x4(q[i], QueryStage<Traits::kHeadDim>::lane_chunk(stage, first + i));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBatch && first + i < kSteps; ++i) {
            wgmma_rs<typename Traits::T, Major::kSum>(
                accumulators, q[i], Traits::Tile::along_columns(k_tile, first + i), first + i > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
    }
}

// O = P V, or += when accumulate, of kColumns columns from `first_column` on.
template <typename Traits, int kColumns>
__device__ __forceinline__ void compute_pv_columns(
    float (&o)[kColumns / 2], const Probs<Traits>& probs, uint32_t v_tile, int first_column, bool accumulate) {
    using Tile = typename Traits::Tile;
    static_assert(kColumns % Tile::kPanelColumns == 0, "a product reads whole panels of V");
#pragma unroll
    for (int step = 0; step < Traits::kTileK / 16; ++step) {
        const uint32_t a[4] = {
            probs[0][2 * step][0], probs[0][2 * step][1], probs[0][2 * step + 1][0], probs[0][2 * step + 1][1]};
        wgmma_rs<typename Traits::T, Major::kOuter>(
            o, a, Tile::along_rows(v_tile, step, first_column / Tile::kPanelColumns), accumulate || step > 0);
    }
}

// Columns of O from accumulators to the stage, as T.
template <typename T, int kHeadDim, int kColumns>
__device__ __forceinline__ void output_to_stage(uint32_t stage, const float (&o)[kColumns / 2], int first_column) {
    using Type = HalfType<T>;
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
        const float* const x = o + 8 * i;
        const uint32_t words[4] = {
            Type::pack(x[0], x[1]), Type::pack(x[2], x[3]), Type::pack(x[4], x[5]), Type::pack(x[6], x[7])};
        stmatrix_x4(QueryStage<kHeadDim>::lane_chunk(stage, first_column / 16 + i), words);
    }
}

// Whole rows from the stage to memory; lane i describes row i % 16. o_partial: partial row 0
template <int kHeadDim>
__device__ __forceinline__ void store_partials(uint32_t stage, __half* o_partial, int head_dim, const QueryRow& row) {
    using Stage = QueryStage<kHeadDim>;
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * Stage::kChunks / 32; ++i) {
        const int tile_row = (i * 32 + lane) / Stage::kChunks, chunk = (i * 32 + lane) % Stage::kChunks;
        const int partial_row = __shfl_sync(~0u, row.partial_row, tile_row);
        const uint4 x = load_shared_16(stage + Stage::Layout::offset(tile_row, chunk));
        store_global_16_streaming(
            o_partial + static_cast<int64_t>(partial_row) * head_dim + chunk * 8, x,
            partial_row >= 0 && chunk * 8 < head_dim);
    }
}

}  // namespace forward_main
}  // namespace fsa
