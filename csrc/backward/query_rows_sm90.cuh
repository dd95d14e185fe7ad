// Shared memory of the backward main kernel for Hopper, and the query rows in it: described, gathered, finished.
#pragma once

#include "backward/main_sm90_traits.h"
#include "device/ptx.cuh"
#include "device/softmax.cuh"
#include "device/work_item.cuh"
#include "params.h"

namespace fsa {
namespace backward_main_sm90 {

// Where a lane stands in the accumulators of a product and in A fragments: its first row (the other is 8 below it) and
// its place among the four lanes that share rows. Read anew at every call, see thread_index_unhoisted.
struct Lane {
    int row, quad_lane;
};

template <typename Traits>
__device__ __forceinline__ int own_thread() {
    static_assert((Traits::kThreads & (Traits::kThreads - 1)) == 0);
    return thread_index_unhoisted() & (Traits::kThreads - 1);  // a range that makes divisions shifts
}

template <typename Traits>
__device__ __forceinline__ Lane own_lane() {
    const int thread = own_thread<Traits>();
    return {thread / 32 * 16 + thread % 32 / 4, thread % 4};
}

// The query rows of a tile, in shared memory.
template <typename Traits>
struct QueryTileRows {
    struct Source {
        const typename Traits::T *q, *dout;
    };
    Source source[Traits::kTileQ];     // rows that do not exist have those of one that does
    int partial_row[Traits::kTileQ];   // of dq_partial; -1: no such row
    int last_visible[Traits::kTileQ];  // counted from the sub-block's first key
    float lse_log2
        [Traits::kTileQ];  // natural until finish_rows; +inf where the row must not contribute: exp2(x - inf) = 0
    float delta[Traits::kTileQ];
};

// What a CTA knows of its current work item. It lies in shared memory: the accumulators leave no registers for it.
struct ItemState {
    WorkItemQueue queue;
    int cell_edges[2];       // where the cell's edges begin and end
    int nonfinite_keys;      // K holds inf or NaN
    unsigned char* partial;  // dq_partial from the item's KV head on
};

template <typename Traits>
struct SharedTiles {
    uint32_t k, v, queries, dscores;  // shared-memory addresses; queries: [stage] (Q, dO)
    QueryTileRows<Traits>* rows;      // [stage]
    float* poison;                    // [tile_k]: NaN for a key that holds inf or NaN, else 0
    ItemState* state;

    __device__ __forceinline__ uint32_t q(int tile) const {
        return queries + tile % Traits::kQueryStages * Traits::kQueryStageBytes;
    }
    __device__ __forceinline__ uint32_t dout(int tile) const {
        return q(tile) + Traits::QueryTile::kBytes;
    }
    __device__ __forceinline__ QueryTileRows<Traits>& rows_of(int tile) const {
        return rows[tile % Traits::kRowStages];
    }
};

template <typename Traits>
__device__ __forceinline__ SharedTiles<Traits> carve_shared_memory(unsigned char* shared) {
    static_assert(sizeof(QueryTileRows<Traits>) == Traits::kRowBytes && sizeof(ItemState) <= Traits::kStateBytes);
    SharedTiles<Traits> s;
    s.k = shared_address(shared);
    s.v = s.k + Traits::KeyTile::kBytes;
    s.queries = s.v + Traits::KeyTile::kBytes;
    s.dscores = s.queries + Traits::kQueryStages * Traits::kQueryStageBytes;
    s.rows = reinterpret_cast<QueryTileRows<Traits>*>(shared + Traits::kTileBytes);
    s.poison = reinterpret_cast<float*>(s.rows + Traits::kRowStages);
    s.state = reinterpret_cast<ItemState*>(s.poison + Traits::kTileK);
    return s;
}

// Row i of a tile: thread i writes what comes from q and lse, thread i + kTileQ, of another warp, what comes from dout
// and delta. lse and delta arrive asynchronously, as they are in memory: finish_rows is for later.
template <typename Traits>
__device__ __forceinline__ void describe_rows(
    QueryTileRows<Traits>& rows, const BackwardMainParams& p, const WorkItem& item, int first_row, int edge) {
    using T = typename Traits::T;
    const int thread = own_thread<Traits>(), i = thread % Traits::kTileQ;
    const QueryRow row = make_query_row(p.geometry, item, first_row + i, edge);
    const int64_t head = static_cast<int64_t>(item.kv_head) * p.geometry.group_size + row.group_head;
    const int64_t at = head * p.geometry.sequences.total_q + row.query;
    if (thread < Traits::kTileQ) {
        rows.source[i].q = row_pointer<T>(p.q, row.query, head);
        rows.partial_row[i] = row.partial_row;
        cp_async_4(shared_address(&rows.lse_log2[i]), p.lse + at);
    } else {
        rows.source[i].dout = row_pointer<T>(p.dout, row.query, head);
        rows.last_visible[i] = row.last_visible;
        cp_async_4(shared_address(&rows.delta[i]), p.delta + at);
    }
}

// Of rows whose lse and delta have arrived.
template <typename Traits>
__device__ __forceinline__ void finish_rows(QueryTileRows<Traits>& rows) {
    const int i = own_thread<Traits>();
    if (i >= Traits::kTileQ) return;
    const float lse = rows.lse_log2[i];
    const bool contributes = rows.partial_row[i] >= 0 && lse != -INFINITY;
    rows.lse_log2[i] = contributes ? lse * kLog2E : INFINITY;
    if (!contributes) rows.delta[i] = 0.f;
}

// Q and dO of a tile, asynchronously. Rows that do not exist and columns behind head_dim become zeros. Neighbouring
// threads copy neighbouring chunks of a panel's row. Each of a query's blocks asks for its rows again, so L2 keeps them
// rather than partials of dQ, which pass through it once.
template <typename Traits>
__device__ __forceinline__ void gather_queries(
    const SharedTiles<Traits>& shared, const BackwardMainParams& p, int tile) {
    using Tile = typename Traits::QueryTile;
    constexpr int kChunks = Tile::kPanelColumns / 8, kPanels = Traits::kHeadDim / Tile::kPanelColumns;
    constexpr int kRowsAtOnce = Traits::kThreads / kChunks, kPerThread = Traits::kTileQ / kRowsAtOnce;
    static_assert(Traits::kTileQ % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0);  // the swizzle repeats every 8 rows
    const QueryTileRows<Traits>& rows = shared.rows_of(tile);
    const int thread = own_thread<Traits>(), first_row = thread / kChunks, chunk = thread % kChunks;
    const int chunks_left = p.geometry.head_dim / 8 - chunk;
    const uint32_t q = shared.q(tile) + Tile::offset(first_row, chunk);
    const uint64_t policy = evict_last_policy();
    typename QueryTileRows<Traits>::Source source[kPerThread];
    bool exists[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        source[i] = rows.source[first_row + i * kRowsAtOnce];
        exists[i] = rows.partial_row[first_row + i * kRowsAtOnce] >= 0;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const uint32_t to = q + i * kRowsAtOnce * Tile::kRowBytes;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const bool valid = exists[i] && panel * kChunks < chunks_left;
            const int column = panel * Tile::kPanelColumns;
            cp_async_16(to + panel * Tile::kPanelBytes, source[i].q + chunk * 8 + column, valid, policy);
            cp_async_16(
                to + Tile::kBytes + panel * Tile::kPanelBytes, source[i].dout + chunk * 8 + column, valid, policy);
        }
    }
}

}  // namespace backward_main_sm90
}  // namespace fsa
