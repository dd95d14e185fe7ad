// Walking the slots of rows (query, head): what the stages share that merge partials. In reduce a row has kLanes lanes, each on 8
// columns.
//
// Reduce lives from the bytes that are on their way, so no load waits that need not: the partials of a row are taken
// in batches, all loads of a batch go out together, knowing no more than its block ids, and these were asked for a
// batch earlier, across rows.
#pragma once

#include "device/convert.cuh"
#include "device/sequence.cuh"
#include "params.h"

namespace fsa {

template <int kLanes>
struct ReduceTraits {
    static constexpr int kThreads = 128;
    static constexpr int kRows = kThreads / kLanes;           // rows that a CTA works on at a time: a tile
    static constexpr int kBatch = kLanes < 16 ? kLanes : 16;  // partials in flight; lane i < kBatch looks after one
    // A partial in flight takes four registers. Below sm_90, 96 a thread (5 CTAs) are a few too little.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    static constexpr int kMinCtas = kBatch < 16 ? 7 : 4;
#else
    static constexpr int kMinCtas = kBatch < 16 ? 7 : 5;
#endif

    static FSA_HOST_DEVICE int num_tiles(const Geometry& g) {
        return (g.num_heads * g.num_queries * g.group_size - 1) / kRows + 1;
    }
};

// Row of a thread in [num_heads, num_queries, group_size]. Behind the last row, it is the last: written twice, with the
// same bits.
template <int kLanes>
__device__ __forceinline__ int row_of_tile(const Geometry& g, int tile) {
    const unsigned row = static_cast<unsigned>(tile) * ReduceTraits<kLanes>::kRows + threadIdx.x / kLanes;
    return static_cast<int>(min(row, static_cast<unsigned>(g.num_heads * g.num_queries * g.group_size - 1)));
}

struct RowPosition {
    int head;        // KV head, counted from the chunk's first
    int query;       // counted from the chunk's first
    int group_head;  // 0 .. group_size - 1
};

__device__ __forceinline__ RowPosition position_of_row(const Geometry& g, int row) {
    RowPosition r;
    const int head_and_query = g.by_group_size.quotient(row);
    r.group_head = row - head_and_query * g.group_size;
    r.head = g.by_num_queries.quotient(head_and_query);
    r.query = head_and_query - r.head * g.num_queries;
    return r;
}

// What decides which partials the rows of a query and KV head have. Partial i = 0 .. topk * subs - 1 of a row is sub-block
// i % subs of slot i / subs.
struct QuerySlots {
    int last_key;    // last key the query sees, counted from the start of its sequence; negative: none
    int first_cell;  // cell of block 0 of the sequence
};

// Those of a row, and where they are.
struct SlotRow : QuerySlots {
    int first_partial;  // partial 0 in [num_heads, num_queries, topk, subs, group_size]; they are group_size apart
};

// head: counted from the chunk's first
__device__ __forceinline__ QuerySlots make_query_slots(const Geometry& g, int head, int token) {
    const int sequence = sequence_of_query(g.sequences, token);
    const SequenceBounds bounds = sequence_bounds(g.sequences, sequence);
    return {
        last_visible_key(bounds, token, g.causal),
        head * g.num_blocks + first_block(bounds.key_begin, sequence, g.block_size)};
}

__device__ __forceinline__ SlotRow load_slot_row(const Geometry& g, int row) {
    const RowPosition position = position_of_row(g, row);
    const int first_partial = (row - position.group_head) * g.topk * g.subs + position.group_head;
    return {make_query_slots(g, position.head, g.query_begin + position.query), first_partial};
}

// The block that partial i of a row belongs to, -1 behind the last.
__device__ __forceinline__ int load_block_id(const Geometry& g, const int32_t* topk_idx, int row, int i) {
    if (i >= g.topk * g.subs) return -1;
    const RowPosition r = position_of_row(g, row);
    const int64_t token = static_cast<int64_t>(g.head_begin + r.head) * g.sequences.total_q + g.query_begin + r.query;
    return __ldg(topk_idx + token * g.topk + g.by_subs.quotient(i));
}

// Whether main wrote partial i of the rows.
__device__ __forceinline__ bool partial_exists(const Geometry& g, const QuerySlots& r, int block_id, int i) {
    const int sub = i - g.by_subs.quotient(i) * g.subs;
    return slot_attends(block_id, g.block_size, sub * g.by_subs.quotient(g.block_size), r.last_key);
}

// Requests this lane's chunk, 8 elements, of each partial of a batch; zero where there is none, for what main did not
// write must not count, and may be NaN. Lane i says whether partial i exists. `from` is the lane's chunk of partial 0,
// `stride` the elements between two partials.
template <int kLanes, typename Partial>
__device__ __forceinline__ void load_partials(
    uint4 (&chunks)[ReduceTraits<kLanes>::kBatch], const Partial* from, int64_t stride, bool exists,
    bool columns_exist) {
    const unsigned of_warp = __ballot_sync(~0u, exists);
    const unsigned of_row = columns_exist ? of_warp >> (threadIdx.x % 32 / kLanes * kLanes) : 0u;
#pragma unroll
    for (int i = 0; i < ReduceTraits<kLanes>::kBatch; ++i) {
        chunks[i] = make_uint4(0, 0, 0, 0);
        if (of_row >> i & 1) chunks[i] = __ldcs(reinterpret_cast<const uint4*>(from));
        from += stride;
    }
}

// sum += weight * chunk
template <typename T>
__device__ __forceinline__ void add_chunk(float (&sum)[8], const uint4& chunk, float weight) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const float2 x = HalfType<T>::unpack(words[w]);
        sum[2 * w] = fmaf(weight, x.x, sum[2 * w]);
        sum[2 * w + 1] = fmaf(weight, x.y, sum[2 * w + 1]);
    }
}

template <typename T>
__device__ __forceinline__ void store_chunk(T* chunk, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(chunk) = make_uint4(
        HalfType<T>::pack(x[0], x[1]), HalfType<T>::pack(x[2], x[3]), HalfType<T>::pack(x[4], x[5]),
        HalfType<T>::pack(x[6], x[7]));
}

// Query head of a row among those of the tensors.
__device__ __forceinline__ int64_t query_head(const Geometry& g, const RowPosition& r) {
    return static_cast<int64_t>(g.head_begin + r.head) * g.group_size + r.group_head;
}

}  // namespace fsa
