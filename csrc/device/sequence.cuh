// Sequences, blocks and visibility: which keys a query token may see. Every stage asks here, so all agree.
#pragma once

#include "params.h"

namespace fsa {

struct SequenceBounds {
    int query_begin, num_queries;
    int key_begin, num_keys;
};

__device__ __forceinline__ int clamped(const int32_t* cu_seqlens, int i, int total) {
    return min(max(cu_seqlens[i], 0), total);
}

__device__ __forceinline__ SequenceBounds sequence_bounds(const Sequences& s, int sequence) {
    SequenceBounds b;
    b.query_begin = clamped(s.cu_seqlens_q, sequence, s.total_q);
    b.num_queries = max(clamped(s.cu_seqlens_q, sequence + 1, s.total_q) - b.query_begin, 0);
    b.key_begin = clamped(s.cu_seqlens_k, sequence, s.total_k);
    b.num_keys = max(clamped(s.cu_seqlens_k, sequence + 1, s.total_k) - b.key_begin, 0);
    return b;
}

// The block ids of sequence b stand at first_block(b) + id among all blocks. ceil(length / block_size) of them never
// reach first_block(b + 1), so the ranges need no prefix sum. key_begin: the sequence's
__device__ __forceinline__ int first_block(int key_begin, int sequence, int block_size) {
    return key_begin / block_size + sequence;
}

__device__ __forceinline__ int first_block(const Sequences& s, int sequence, int block_size) {
    return first_block(clamped(s.cu_seqlens_k, sequence, s.total_k), sequence, block_size);
}

// The largest i in [0, count) with start(i) <= value; 0 when there is none.
template <typename Start>
__device__ __forceinline__ int last_not_after(int count, int value, Start start) {
    int low = 0, high = count;  // start(low) <= value < start(high), as far as known
    while (high - low > 1) {
        const int middle = (low + high) >> 1;
        if (start(middle) <= value) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

__device__ __forceinline__ int sequence_of_query(const Sequences& s, int query) {
    return last_not_after(s.batch, query, [&](int i) { return s.cu_seqlens_q[i]; });
}

__device__ __forceinline__ int sequence_of_block(const Sequences& s, int block, int block_size) {
    return last_not_after(s.batch, block, [&](int i) { return first_block(s, i, block_size); });
}

// A query token of a sequence sees its keys up to min(query + offset, end), counted from the start of the sequence.
struct VisibleKeys {
    int offset, end;
};

__device__ __forceinline__ VisibleKeys visible_keys(const SequenceBounds& b, bool causal) {
    const int end = b.num_keys - 1;
    // Without causality any offset from `end` up says "all".
    return {causal ? b.num_keys - b.num_queries - b.query_begin : end, end};
}

// The last key that a query token sees; negative when it sees none, or is not of this sequence.
__device__ __forceinline__ int last_visible_key(const SequenceBounds& b, int query, bool causal) {
    if (query < b.query_begin || query - b.query_begin >= b.num_queries) return -1;
    const VisibleKeys visible = visible_keys(b, causal);
    return min(query + visible.offset, visible.end);
}

// Whether a slot with this block id, or its sub-block that starts `key_offset` keys into the block, holds a visible
// key.
__device__ __forceinline__ bool slot_attends(int block_id, int block_size, int key_offset, int last_key) {
    return block_id >= 0 && static_cast<int64_t>(block_id) * block_size + key_offset <= last_key;
}

// The number of blocks with a visible key: slot_attends for key_offset 0 is true of the ids below it, and of no other.
__device__ __forceinline__ int visible_blocks(int block_size, int last_key) {
    return last_key < 0 ? 0 : last_key / block_size + 1;
}

}  // namespace fsa
