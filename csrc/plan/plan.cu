// A stable counting sort of the edges by cell: count by part of the queries, one prefix sum over (cell, part), fill.
//
// A part is a run of query tokens that one CTA counts and later fills; inside it every warp owns a run of its own.
// Prefix sums over (cell, part) and over (cell, warp) say where each warp writes, so the order of a cell's edges is
// that of the queries and no two runs of the program differ. Nothing is sorted by comparison and no result depends on
// the order of atomics.
#include "plan/plan.h"

#include <cub/device/device_scan.cuh>

#include "device/ptx.cuh"
#include "device/sequence.cuh"
#include "launch.h"

namespace fsa {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
// Cells that a CTA counts in shared memory: 8 warps x 2048 x 4 bytes = 64 KB. Longer sequences (131,072 tokens in
// blocks of 64) are counted window by window.
constexpr int kWindow = 2048;
constexpr int kInFlight = 4;  // steps of 32 edges whose block ids are loaded ahead of their use

// The query tokens [begin, end) of a run, relative to the chunk.
struct QueryRange {
    int begin, end;
};

__device__ __forceinline__ QueryRange split(QueryRange range, int pieces, int piece) {
    const int each = (range.end - range.begin + pieces - 1) / pieces;
    const int begin = min(range.begin + piece * each, range.end);
    return {begin, min(begin + each, range.end)};
}

// The block (among all blocks of all sequences) that an edge selects, or -1 when its slot attends to nothing.
__device__ __forceinline__ int block_of_edge(const PlanParams& p, int head, int edge) {
    const Geometry& g = p.geometry;
    const int query = g.query_begin + g.by_topk.quotient(edge);
    const int64_t row = static_cast<int64_t>(g.head_begin + head) * g.sequences.total_q + g.query_begin;
    const int id = __ldg(p.topk_idx + row * g.topk + edge);
    const int sequence = sequence_of_query(g.sequences, query);
    const SequenceBounds bounds = sequence_bounds(g.sequences, sequence);
    if (!slot_attends(id, g.block_size, 0, last_visible_key(bounds, query, g.causal))) return -1;
    return first_block(g.sequences, sequence, g.block_size) + id;
}

__device__ __forceinline__ int64_t count_index(const PlanParams& p, int head, int block, int part) {
    return (static_cast<int64_t>(head) * p.geometry.num_blocks + block) * p.parts + part;
}

__global__ void __launch_bounds__(kThreads) plan_count(PlanParams p) {
    __shared__ int counts[kWindow];
    const Geometry& g = p.geometry;
    const int part = blockIdx.x, head = blockIdx.y;
    const int window_begin = blockIdx.z * kWindow, window = min(kWindow, g.num_blocks - window_begin);

    for (int i = threadIdx.x; i < window; i += kThreads) counts[i] = 0;
    __syncthreads();

    const QueryRange queries = split({0, g.num_queries}, p.parts, part);
    for (int edge = queries.begin * g.topk + threadIdx.x; edge < queries.end * g.topk; edge += kThreads) {
        const unsigned cell = static_cast<unsigned>(block_of_edge(p, head, edge) - window_begin);
        if (cell < static_cast<unsigned>(window)) atomicAdd(&counts[cell], 1);
    }
    __syncthreads();

    for (int i = threadIdx.x; i < window; i += kThreads)
        p.counts[count_index(p, head, window_begin + i, part)] = counts[i];
    if (blockIdx.x + blockIdx.y + blockIdx.z == 0 && threadIdx.x == 0) {
        p.counts[count_index(p, g.num_heads, 0, 0)] = 0;  // after the prefix sum: the number of edges
    }
}

__global__ void __launch_bounds__(kThreads) plan_fill(PlanParams p) {
    int* all_cursors = static_cast<int*>(dynamic_shared_memory());  // [kWarps][window]: where a warp writes next
    const Geometry& g = p.geometry;
    const int part = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int window_begin = blockIdx.z * kWindow, window = min(kWindow, g.num_blocks - window_begin);
    int* cursors = all_cursors + warp * window;

    for (int i = threadIdx.x; i < kWarps * window; i += kThreads) all_cursors[i] = 0;
    __syncthreads();

    const QueryRange queries = split(split({0, g.num_queries}, p.parts, part), kWarps, warp);
    const int edge_end = queries.end * g.topk;
    auto load_cell = [&](int edge) {
        const int cell = edge < edge_end ? block_of_edge(p, head, edge) - window_begin : -1;
        return static_cast<unsigned>(cell) < static_cast<unsigned>(window) ? cell : -1;
    };

    for (int edge = queries.begin * g.topk + lane; edge < edge_end; edge += 32) {
        const int cell = load_cell(edge);
        if (cell >= 0) atomicAdd(&cursors[cell], 1);
    }
    __syncthreads();

    for (int i = threadIdx.x; i < window;
         i += kThreads) {  // counts to cursors: a warp starts where the one before ends
        int next = p.counts[count_index(p, head, window_begin + i, part)];
        for (int w = 0; w < kWarps; ++w) {
            const int count = all_cursors[w * window + i];
            all_cursors[w * window + i] = next;
            next += count;
        }
    }
    __syncthreads();

    for (int first = queries.begin * g.topk; first < edge_end; first += 32 * kInFlight) {
        int cells[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) cells[i] = load_cell(first + i * 32 + lane);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int cell = cells[i];
            const unsigned peers = __match_any_sync(~0u, cell);
            const int rank = __popc(peers & ((1u << lane) - 1));
            const int cursor = cell >= 0 ? cursors[cell] : 0;
            if (cell >= 0) p.csr_edges[cursor + rank] = first + i * 32 + lane;
            __syncwarp();
            if (cell >= 0 && rank == 0) cursors[cell] = cursor + __popc(peers);
            __syncwarp();
        }
    }
}

// Work item i of cell c is entry csr_offsets[c] / edges_per_item + c + i of the list. A cell of n edges has
// ceil(n / edges_per_item) items and the entries up to the next cell's first are at least as many, so entries need no
// prefix sum; those left over are marked unused. A warp a cell: a block that everyone selects has thousands of items.
__global__ void __launch_bounds__(kThreads) plan_work_items(PlanParams p) {
    const Geometry& g = p.geometry;
    const int num_cells = g.num_heads * g.num_blocks, num_threads = gridDim.x * kThreads;
    const int thread = blockIdx.x * kThreads + threadIdx.x, lane = thread % 32;
    const int num_edges = p.counts[static_cast<int64_t>(num_cells) * p.parts];

    for (int cell = thread / 32; cell < num_cells; cell += num_threads / 32) {
        const int begin = p.counts[static_cast<int64_t>(cell) * p.parts];
        const int end = p.counts[static_cast<int64_t>(cell + 1) * p.parts];
        const int sequence = sequence_of_block(g.sequences, cell % g.num_blocks, g.block_size);
        if (lane == 0) p.csr_offsets[cell] = begin;
        const int first_entry = begin / p.edges_per_item + cell,
                  num_entries = end / p.edges_per_item + cell + 1 - first_entry;
        for (int i = lane; i < num_entries; i += 32) {
            const int edge = begin + i * p.edges_per_item;
            p.work_items[first_entry + i] = edge < end
                                                ? make_int4(cell, edge, min(edge + p.edges_per_item, end), sequence)
                                                : make_int4(-1, 0, 0, 0);
        }
    }
    if (thread == 0) p.csr_offsets[num_cells] = num_edges;
    for (int entry = num_edges / p.edges_per_item + num_cells + thread; entry < p.max_items; entry += num_threads) {
        p.work_items[entry] = make_int4(-1, 0, 0, 0);
    }
}

}  // namespace

size_t plan_scan_scratch_bytes(int num_counts) {
    size_t bytes = 0;
    check_cuda(
        cub::DeviceScan::ExclusiveSum(
            nullptr, bytes, static_cast<int32_t*>(nullptr), static_cast<int32_t*>(nullptr), num_counts),
        "plan");
    return bytes;
}

void launch_plan(const PlanParams& p, cudaStream_t stream) {
    const Geometry& g = p.geometry;
    const int windows = (g.num_blocks + kWindow - 1) / kWindow;
    const dim3 grid(p.parts, g.num_heads, windows);
    launch("plan_count", plan_count, {grid, kThreads, 0}, p, stream);

    size_t scratch_bytes = p.scan_scratch_bytes;
    const int num_counts = g.num_heads * g.num_blocks * p.parts + 1;
    check_cuda(
        cub::DeviceScan::ExclusiveSum(p.scan_scratch, scratch_bytes, p.counts, p.counts, num_counts, stream),
        "plan_scan");

    const int num_cells = g.num_heads * g.num_blocks;
    const int item_ctas = min((num_cells + kWarps - 1) / kWarps, 4 * sm_count());
    launch("plan_work_items", plan_work_items, {dim3(item_ctas), kThreads, 0}, p, stream);

    const int fill_bytes = kWarps * min(kWindow, g.num_blocks) * static_cast<int>(sizeof(int));
    launch("plan_fill", plan_fill, {grid, kThreads, fill_bytes}, p, stream);
}

}  // namespace fsa
