// Walking the slots of one (query, head): what both reduce stages share. kLanes lanes work on a row, each on 8 columns.
#pragma once

#include "device/convert.cuh"
#include "device/sequence.cuh"
#include "params.h"

namespace fsa {

// The row that a group of kLanes lanes reduces.
struct SlotRow {
    int head;        // KV head, counted from the chunk's first
    int query;       // counted from the chunk's first
    int group_head;  // 0 .. group_size - 1
    int last_key;    // last key the query sees, counted from the start of its sequence; negative: none
    int first_block;
    const int32_t* block_ids;  // [topk]
    int64_t partial_row;       // of slot 0, sub-block 0, in [num_heads, num_queries, topk, subs, group_size]
};

__device__ __forceinline__ SlotRow load_slot_row(const Geometry& g, const int32_t* topk_idx, int row) {
    SlotRow r;
    const int head_and_query = g.by_group_size.quotient(row);
    r.group_head = row - head_and_query * g.group_size;
    r.head = head_and_query / g.num_queries;
    r.query = head_and_query - r.head * g.num_queries;
    const int token = g.query_begin + r.query;
    const int sequence = sequence_of_query(g.sequences, token);
    r.last_key = last_visible_key(sequence_bounds(g.sequences, sequence), token, g.causal);
    r.first_block = first_block(g.sequences, sequence, g.block_size);
    r.block_ids = topk_idx + (static_cast<int64_t>(g.head_begin + r.head) * g.sequences.total_q + token) * g.topk;
    r.partial_row = static_cast<int64_t>(head_and_query) * g.topk * g.subs * g.group_size + r.group_head;
    return r;
}

// Partial i = 0 .. topk * subs - 1 of a row: sub-block i % subs of slot i / subs.
struct SlotPartial {
    bool used;    // main wrote it
    int64_t row;  // in [num_heads, num_queries, topk, subs, group_size]
    int block;    // among the blocks of all sequences
    int sub;
};

__device__ __forceinline__ SlotPartial load_slot_partial(const Geometry& g, const SlotRow& r, int i) {
    SlotPartial s = {false, 0, 0, 0};
    if (i >= g.topk * g.subs) return s;
    const int slot = g.subs == 1 ? i : i / g.subs;
    s.sub = i - slot * g.subs;
    const int id = __ldg(r.block_ids + slot);
    s.used = slot_attends(id, g.block_size, s.sub * (g.block_size / g.subs), r.last_key);
    s.row = r.partial_row + static_cast<int64_t>(i) * g.group_size;
    s.block = r.first_block + id;
    return s;
}

// sum += weight * partial over the kLanes partials whose weights the lanes hold. Every lane reads 16 bytes a partial;
// all reads of a batch are in flight together. Partials of weight 0 are not read: main may not have written them.
template <typename Partial, int kLanes>
__device__ __forceinline__ void accumulate_partials(
    float (&sum)[8], const Partial* first_chunk, int64_t row_stride, float weight, int count, bool chunk_exists) {
    constexpr int kBatch = 8;
    static_assert(kLanes % kBatch == 0);
    for (int first = 0; first < min(kLanes, count); first += kBatch) {
        uint4 chunks[kBatch];
        float weights[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            weights[i] = __shfl_sync(~0u, weight, first + i, kLanes);
            chunks[i] = make_uint4(0, 0, 0, 0);
            if (weights[i] != 0.f && chunk_exists) {
                chunks[i] = __ldcs(reinterpret_cast<const uint4*>(first_chunk + (first + i) * row_stride));
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const uint32_t words[4] = {chunks[i].x, chunks[i].y, chunks[i].z, chunks[i].w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float2 x = HalfType<Partial>::unpack(words[w]);
                sum[2 * w] = fmaf(weights[i], x.x, sum[2 * w]);
                sum[2 * w + 1] = fmaf(weights[i], x.y, sum[2 * w + 1]);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void store_row_chunk(T* chunk, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(chunk) = make_uint4(
        HalfType<T>::pack(x[0], x[1]), HalfType<T>::pack(x[2], x[3]), HalfType<T>::pack(x[4], x[5]),
        HalfType<T>::pack(x[6], x[7]));
}

}  // namespace fsa
