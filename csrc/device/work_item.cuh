// What one iteration of a persistent main kernel works on: a sub-block of keys and a run of rows (edges x group) that
// attend to it.
#pragma once

#include "device/ptx.cuh"
#include "device/sequence.cuh"
#include "params.h"

namespace fsa {

struct WorkItem {
    int cell;
    int head;     // KV head, counted from the chunk's first
    int kv_head;  // KV head of the tensors
    int sub;      // sub-block of the block
    int edge_begin;
    int num_edges;
    int num_rows;        // num_edges * group_size; row r is head r % group_size of edge r / group_size
    int first_key;       // of the sub-block, counted from the start of its sequence
    int num_keys;        // keys of the sub-block inside the sequence, > 0
    int key_token;       // first_key as a row of k and v
    int visible_offset;  // VisibleKeys, counted from first_key
    int visible_end;
};

// num_keys <= 0 when there is nothing to do: the sub-block lies behind the end of its sequence.
__device__ __forceinline__ WorkItem make_work_item(const Geometry& g, const int4& entry, int sub, int tile_k) {
    const SequenceBounds bounds = sequence_bounds(g.sequences, entry.w);
    const VisibleKeys visible = visible_keys(bounds, g.causal);
    WorkItem item;
    item.cell = entry.x;
    item.head = entry.x / g.num_blocks;
    item.kv_head = g.head_begin + item.head;
    item.sub = sub;
    item.edge_begin = entry.y;
    item.num_edges = entry.z - entry.y;
    item.num_rows = item.num_edges * g.group_size;
    const int block_id = entry.x - item.head * g.num_blocks - first_block(g.sequences, entry.w, g.block_size);
    item.first_key = block_id * g.block_size + sub * tile_k;
    item.num_keys = min(bounds.num_keys - item.first_key, tile_k);
    item.key_token = bounds.key_begin + item.first_key;
    item.visible_offset = visible.offset - item.first_key;
    item.visible_end = visible.end - item.first_key;
    return item;
}

// The work items of a CTA, in shared memory: the inner loops need their registers for other things. CTAs take items and
// their sub-blocks from a counter as they get done, for items differ in length.
struct WorkItemQueue {
    int4 next_entry;  // of the list, on its way
    int next_sub;
    WorkItem item;
};

// The next number of the loop over work items and sub-blocks. Thread 0's alone means anything.
__device__ __forceinline__ int claim_work_item(const PlanView& plan) {
    return threadIdx.x == 0 ? atomicAdd(plan.next_item, 1) : 0;
}

// Asks for the entry of the number that was claimed. Once an item, which is long enough for the answers to both. Where items
// are few, with its last tile: one that is claimed earlier waits while other SMs are idle.
__device__ __forceinline__ void request_work_item(
    WorkItemQueue& queue, const Geometry& g, const PlanView& plan, int claimed) {
    if (threadIdx.x > 0) return;
    const int entry = g.subs == 1 ? claimed : claimed / g.subs;
    queue.next_sub = claimed - entry * g.subs;
    if (entry < plan.max_items) {
        cp_async_16(shared_address(&queue.next_entry), plan.work_items + entry, true);
        cp_async_commit();
    } else {
        queue.next_entry.x = -1;
    }
}

// The item that was requested, or the next one that holds something to do; num_keys <= 0: the list has ended. Thread 0 makes
// it, and waits for all its copies.
__device__ __forceinline__ void receive_work_item(
    WorkItem& item, WorkItemQueue& queue, const Geometry& g, const PlanView& plan, int tile_k) {
    if (threadIdx.x > 0) return;
    cp_async_wait<0>();
    item.num_keys = 0;
    while (queue.next_entry.x >= 0) {
        item = make_work_item(g, queue.next_entry, queue.next_sub, tile_k);
        if (item.num_keys > 0) break;
        request_work_item(queue, g, plan, claim_work_item(plan));
        cp_async_wait<0>();
    }
}

// Goes on to the item that was requested. False at the end of the list. All threads take part, and all are done with the item
// before when the first of them returns.
__device__ __forceinline__ bool fetch_work_item(
    WorkItemQueue& queue, const Geometry& g, const PlanView& plan, int tile_k) {
    __syncthreads();
    receive_work_item(queue.item, queue, g, plan, tile_k);
    __syncthreads();
    return queue.item.num_keys > 0;
}

// The same of an item that thread 0 has received already.
__device__ __forceinline__ bool take_work_item(WorkItemQueue& queue, const WorkItem& next) {
    __syncthreads();
    if (threadIdx.x == 0) queue.item = next;
    __syncthreads();
    return queue.item.num_keys > 0;
}

// Row of [num_heads, num_queries, topk, subs, group_size] where the partials of the item's KV head begin.
__device__ __forceinline__ int64_t first_partial_row(const Geometry& g, int head) {
    return static_cast<int64_t>(head) * g.num_queries * g.topk * g.subs * g.group_size;
}

// One row of a tile of queries.
struct QueryRow {
    int query;       // query token
    int group_head;  // 0 .. group_size - 1
    // Counted from first_partial_row; -1: nothing is stored, for the query sees no key of the sub-block, or the row
    // lies behind the item's last one (and repeats it).
    int partial_row;
    int last_visible;  // last key of the sub-block that the query sees, counted from first_key; negative: none
};

__device__ __forceinline__ int load_edge(const Geometry& g, const PlanView& plan, const WorkItem& item, int row) {
    return __ldg(plan.csr_edges + item.edge_begin + g.by_group_size.quotient(min(row, item.num_rows - 1)));
}

__device__ __forceinline__ QueryRow make_query_row(const Geometry& g, const WorkItem& item, int row, int edge) {
    const int clamped_row = min(row, item.num_rows - 1);
    QueryRow r;
    r.group_head = clamped_row - g.by_group_size.quotient(clamped_row) * g.group_size;
    r.query = g.query_begin + g.by_topk.quotient(edge);
    r.last_visible = min(r.query + item.visible_offset, item.visible_end);
    const bool exists = row < item.num_rows && r.last_visible >= 0;
    r.partial_row = exists ? (edge * g.subs + item.sub) * g.group_size + r.group_head : -1;
    return r;
}

// The row of a [tokens, heads, head_dim] tensor.
template <typename T>
__device__ __forceinline__ const T* row_pointer(const RowTensor& t, int64_t token, int64_t head) {
    return static_cast<const T*>(t.data) + token * t.token_stride + head * t.head_stride;
}

}  // namespace fsa
