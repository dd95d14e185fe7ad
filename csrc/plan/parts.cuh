// The parts of a plan: which edges a CTA of plan_count and of plan_fill goes through, and how.
#pragma once

#include "device/chunk_grid.cuh"
#include "device/sequence.cuh"
#include "params.h"
#include "plan/plan.h"

namespace fsa {
namespace plan {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
// Blocks that a CTA counts in shared memory: in plan_fill 8 warps x 2048 x 2 bytes = 32 KB of it, of 88 in all. Longer
// sequences (131,072 tokens in blocks of 64) are counted window by window.
constexpr int kWindow = 2048;
static_assert(kWindow % kPlanGroup == 0, "the cells before a window are whole groups");
constexpr int kTileQueries = 1024;  // queries whose visible blocks lie in shared memory: 8 KB

// [begin, end) of queries, relative to the chunk, or of edges
struct Run {
    int begin, end;
};

__device__ __forceinline__ Run split(Run run, int pieces, int piece) {
    const int each = (run.end - run.begin + pieces - 1) / pieces;
    const int begin = min(run.begin + piece * each, run.end);
    return {begin, min(begin + each, run.end)};
}

// One chunk as if it were alone.
__device__ __forceinline__ PlanParams params_of_chunk(const PlanParams& chunks, int chunk) {
    const Geometry& first = chunks.geometry;
    const int64_t ranges = first.num_heads * chunks.num_ranges, cells = ranges * first.num_blocks;
    PlanParams p = chunks;
    p.geometry = geometry_of_chunk(first, chunks.grid, chunk);
    p.group_sums += chunk * ranges * ((first.num_blocks - 1) / kPlanGroup + 1);
    p.counts += chunk * cells * p.parts;
    p.cell_edges += chunk * cells;
    p.csr_offsets += chunk * (cells + 1);
    p.csr_edges += chunk * (static_cast<int64_t>(first.num_heads) * first.num_queries * first.topk);
    p.work_items += chunk * static_cast<int64_t>(p.max_items);
    p.next_item += chunk;
    return p;
}

// What a CTA of plan_count and of plan_fill works on: the edges from a part's queries to the blocks of a window.
struct Share {
    int part;
    int head;
    int first_cell;    // of the window
    Run queries;       // of the part
    int window_begin;  // block
    int window;        // blocks
    int64_t counts;    // index of the window's first block in PlanParams::counts
};

__device__ __forceinline__ Share own_share(const PlanParams& p) {
    const Geometry& g = p.geometry;
    const int part = static_cast<int>(blockIdx.x) % p.parts, head_and_range = blockIdx.y;
    Share s;
    s.part = part;
    s.head = head_and_range / p.num_ranges;
    const Run range = split({0, g.num_queries}, p.num_ranges, head_and_range - s.head * p.num_ranges);
    s.queries = split(range, p.parts, part);
    s.window_begin = blockIdx.z * kWindow;
    s.window = min(kWindow, g.num_blocks - s.window_begin);
    s.first_cell = head_and_range * g.num_blocks + s.window_begin;
    s.counts = (static_cast<int64_t>(head_and_range) * p.parts + part) * g.num_blocks + s.window_begin;
    return s;
}

// The blocks that a query's ids name: id 0 is block `first` of the window, and those below num_visible attend.
struct QueryBlocks {
    int first;
    int num_visible;
};

// One search for the sequence a query, not one an edge. The caller synchronises.
__device__ __forceinline__ void load_query_blocks(
    QueryBlocks* blocks, const Geometry& g, const Run& queries, int window_begin) {
    for (int i = threadIdx.x; i < queries.end - queries.begin; i += kThreads) {
        const int query = g.query_begin + queries.begin + i;
        const int sequence = sequence_of_query(g.sequences, query);
        const int last_key = last_visible_key(sequence_bounds(g.sequences, sequence), query, g.causal);
        blocks[i] = {
            first_block(g.sequences, sequence, g.block_size) - window_begin, visible_blocks(g.block_size, last_key)};
    }
}

// A tile of a part: some of its queries.
struct Tile {
    const QueryBlocks* blocks;  // [queries], in shared memory
    const int32_t* ids;         // of the head's edges, from the chunk's first on
    Run queries;
    int window;
    const FastDivider& by_topk;

    // The block of the window that each of the edges `first + i * kStride` < end selects; -1: none, or not of the
    // window.
    template <int kStride, int kInFlight>
    __device__ __forceinline__ void load_blocks(int (&selected)[kInFlight], int first, int end) const {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int edge = first + i * kStride;
            selected[i] = edge < end ? __ldg(ids + edge) : -1;
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int edge = min(first + i * kStride, end - 1);
            const QueryBlocks& b = blocks[static_cast<int>(by_topk.quotient(edge)) - queries.begin];
            const bool attends = static_cast<unsigned>(selected[i]) < static_cast<unsigned>(b.num_visible);
            const unsigned block = static_cast<unsigned>(b.first + selected[i]);
            selected[i] = attends && block < static_cast<unsigned>(window) ? static_cast<int>(block) : -1;
        }
    }
};

// Calls f(tile, its edges) for every tile of a part, with all threads of the CTA. blocks: [most_queries], shared
template <typename F>
__device__ __forceinline__ void for_each_tile(
    const PlanParams& p, const Share& share, QueryBlocks* blocks, int most_queries, F&& f) {
    const Geometry& g = p.geometry;
    const int64_t first_query = static_cast<int64_t>(g.head_begin + share.head) * g.sequences.total_q + g.query_begin;
    for (int begin = share.queries.begin; begin < share.queries.end; begin += most_queries) {
        const Run queries = {begin, min(begin + most_queries, share.queries.end)};
        __syncthreads();  // the tile before is done with
        load_query_blocks(blocks, g, queries, share.window_begin);
        __syncthreads();
        const Tile tile = {blocks, p.topk_idx + first_query * g.topk, queries, share.window, g.by_topk};
        f(tile, Run{queries.begin * g.topk, queries.end * g.topk});
    }
}

__device__ __forceinline__ EdgesAndItems operator+(const EdgesAndItems& a, const EdgesAndItems& b) {
    return {a.edges + b.edges, a.items + b.items};
}

__device__ __forceinline__ EdgesAndItems of_cell(int edges, const PlanParams& p) {
    const int items = (edges + p.edges_per_item - p.min_rest) / p.edges_per_item;
    return {edges, edges > 0 ? max(items, 1) : 0};
}

}  // namespace plan
}  // namespace fsa
