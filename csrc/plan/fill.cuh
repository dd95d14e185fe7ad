// plan_fill: the offsets of the cells, the work items, and the edges of a part in the order of the cells. Those of some
// queries are put in order in shared memory first: then the edges of a cell are stored together. A lane keeps its edges in
// registers from when they are counted to when they are put there.
#pragma once

#include <climits>

#include "device/ptx.cuh"
#include "plan/parts.cuh"

namespace fsa {
namespace plan {

constexpr int kTileEdges = 8192;                   // edges that plan_fill sorts in shared memory: 32 KB
constexpr int kLaneEdges = kTileEdges / kThreads;  // a lane's share of them
// Block ids that a lane asks for at a time: it waits for L2.
constexpr int kFillInFlight = 8;
static_assert(kLaneEdges % kFillInFlight == 0, "whole batches");

struct PrefixSum {
    EdgesAndItems before, total;
};

// Over the threads of a CTA, all of which take part. sums: [kWarps], shared
__device__ __forceinline__ PrefixSum cta_prefix_sum(const EdgesAndItems& value, EdgesAndItems* sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    EdgesAndItems inclusive = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const EdgesAndItems left = {
            __shfl_up_sync(~0u, inclusive.edges, step), __shfl_up_sync(~0u, inclusive.items, step)};
        if (lane >= step) inclusive = inclusive + left;
    }
    __syncthreads();  // of an earlier call all have read
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    PrefixSum result = {{inclusive.edges - value.edges, inclusive.items - value.items}, {0, 0}};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) result.before = result.before + sums[w];
        result.total = result.total + sums[w];
    }
    return result;
}

// What stands before each of a window's cells, [window + 1], in shared memory.
__device__ __forceinline__ void load_offsets(
    EdgesAndItems* offsets, EdgesAndItems* sums, const PlanParams& p, const Share& share) {
    const int groups_a_range = (p.geometry.num_blocks - 1) / kPlanGroup + 1;
    const int first_group = blockIdx.y * groups_a_range + share.window_begin / kPlanGroup;
    EdgesAndItems earlier = {0, 0};
    for (int i = threadIdx.x; i < first_group; i += kThreads) earlier = earlier + p.group_sums[i];
    const EdgesAndItems before_window = cta_prefix_sum(earlier, sums).total;

    const Run own = split({0, share.window}, kThreads, threadIdx.x);
    EdgesAndItems sum = {0, 0};
    for (int i = own.begin; i < own.end; ++i) sum = sum + of_cell(p.cell_edges[share.first_cell + i], p);
    const PrefixSum cells = cta_prefix_sum(sum, sums);
    EdgesAndItems next = before_window + cells.before;
    for (int i = own.begin; i < own.end; ++i) {
        offsets[i] = next;
        next = next + of_cell(p.cell_edges[share.first_cell + i], p);
    }
    if (threadIdx.x == 0) offsets[share.window] = before_window + cells.total;
    __syncthreads();
}

// The CTAs of a window share its cells, and the warps of a CTA: a block that everyone selects has thousands of items.
__device__ __forceinline__ void store_work_items(
    const EdgesAndItems* offsets, const PlanParams& p, const Share& share) {
    const Geometry& g = p.geometry;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Run own = split({0, share.window}, p.parts, share.part);
    for (int i = own.begin + warp; i < own.end; i += kWarps) {
        const int block = share.window_begin + i;
        const EdgesAndItems first = offsets[i], end = offsets[i + 1];
        const int sequence = sequence_of_block(g.sequences, block, g.block_size);
        for (int item = first.items + lane; item < end.items; item += 32) {
            const int edge = first.edges + (item - first.items) * p.edges_per_item;
            const int edge_end = item + 1 < end.items ? edge + p.edges_per_item : end.edges;
            p.work_items[item] = make_int4(share.head * g.num_blocks + block, edge, edge_end, sequence);
        }
        if (lane == 0) p.csr_offsets[share.first_cell + i] = first.edges;
    }

    const bool last_range = static_cast<int>(blockIdx.y) == g.num_heads * p.num_ranges - 1;
    if (!last_range || share.window_begin + share.window < g.num_blocks) return;
    const int thread = share.part * kThreads + threadIdx.x;
    for (int item = offsets[share.window].items + thread; item < p.max_items; item += p.parts * kThreads)
        p.work_items[item] = make_int4(-1, 0, 0, 0);
    if (thread == 0) {
        p.csr_offsets[share.first_cell + share.window] = offsets[share.window].edges;
        *p.next_item = 0;
    }
}

// Shared memory of plan_fill, all of it dynamic: CUDA's limit for kernels that ask for nothing counts both kinds.
struct FillMemory {
    QueryBlocks* tile_blocks;  // [kTileQueries]
    EdgesAndItems* sums;       // [kWarps]
    EdgesAndItems* offsets;    // [window + 1], before the first tile
    // [kTileEdges], where offsets were, and a word of either side that is far from all: block << 16 | edge, from the tile's
    // first, by block.
    int* sorted;
    int* cta_next;  // [window]: where the next tile's first edge of a block goes
    int* base;      // [window]: what a block's edges are from where they lie in `sorted`
    // [kWarps / 2][window]: of two warps, 16 bits each, a warp's edges of a block in the tile, then where the first of them
    // goes in `sorted`.
    uint32_t* warp_counters;
};

constexpr int offsets_or_sorted_bytes(int window) {
    constexpr int kSorted = (kTileEdges + 2) * static_cast<int>(sizeof(int));
    const int offsets = (window + 1) * static_cast<int>(sizeof(EdgesAndItems));
    return offsets > kSorted ? offsets : kSorted;
}

constexpr int fill_memory_bytes(int window) {
    return kTileQueries * static_cast<int>(sizeof(QueryBlocks)) + kWarps * static_cast<int>(sizeof(EdgesAndItems)) +
           offsets_or_sorted_bytes(window) + window * static_cast<int>(2 * sizeof(int) + kWarps / 2 * sizeof(uint32_t));
}
static_assert(fill_memory_bytes(kWindow) <= 99 * 1024, "what a CTA of any GPU from sm_80 on may have");
static_assert(
    kWindow < 1 << 15 && kTileEdges + 32 <= 1 << 16, "positive, and no two blocks are within 32 of each other");

__device__ __forceinline__ FillMemory carve_fill_memory(void* shared, int window) {
    FillMemory m;
    m.tile_blocks = static_cast<QueryBlocks*>(shared);
    m.sums = reinterpret_cast<EdgesAndItems*>(m.tile_blocks + kTileQueries);
    m.offsets = m.sums + kWarps;
    m.sorted = reinterpret_cast<int*>(m.offsets) + 1;
    m.cta_next = reinterpret_cast<int*>(reinterpret_cast<char*>(m.offsets) + offsets_or_sorted_bytes(window));
    m.base = m.cta_next + window;
    m.warp_counters = reinterpret_cast<uint32_t*>(m.base + window);
    return m;
}

// A warp's half of the words of warp_counters: as it adds to it, and as it is read.
struct WarpCounters {
    uint32_t* words;
    int half;

    __device__ __forceinline__ WarpCounters(const FillMemory& shared, int warp, int window)
        : words(shared.warp_counters + warp / 2 * window), half(warp % 2) {}
    // Returns what it was before.
    __device__ __forceinline__ uint32_t increment(int block) const {
        return atomicAdd(&words[block], 1u << 16 * half) >> 16 * half & 0xffff;
    }
    __device__ __forceinline__ uint16_t& operator[](int block) const {
        return reinterpret_cast<uint16_t*>(words + block)[half];
    }
};

// A lane's edges of a tile: block << 16 | how many of the warp's edges of that block were counted before; or kNoEdge. Which
// of those that an instruction of the warp counts come first is up to the hardware.
using LaneEdges = uint32_t[kLaneEdges];
constexpr uint32_t kNoEdge = ~0u;

// Counts a warp's share of a tile's edges. Edge i of lane l is own.begin + 32 * i + l.
__device__ __forceinline__ void count_edges(
    LaneEdges& counted, const Tile& tile, const Run& own, const WarpCounters& counters) {
#pragma unroll
    for (int batch = 0; batch < kLaneEdges; batch += kFillInFlight) {
        const int first = own.begin + batch * 32;
        int blocks[kFillInFlight];
        if (first < own.end) tile.load_blocks<32>(blocks, first + static_cast<int>(threadIdx.x) % 32, own.end);
#pragma unroll
        for (int i = 0; i < kFillInFlight; ++i) {
            const bool exists = first < own.end && blocks[i] >= 0;
            counted[batch + i] =
                exists ? static_cast<uint32_t>(blocks[i]) << 16 | counters.increment(blocks[i]) : kNoEdge;
            __syncwarp();  // only edges of one instruction, less than 32 apart, are counted out of order
        }
    }
}

// What the warps counted in a tile becomes where they write: blocks one after the other, and in a block a warp starts
// where the one before ends. Returns the edges of the tile. All threads of the CTA take part.
__device__ __forceinline__ int counts_to_positions(const FillMemory& shared, int window) {
    const Run own = split({0, window}, kThreads, threadIdx.x);
    int sum = 0;
    for (int i = own.begin; i < own.end; ++i)
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) sum += WarpCounters(shared, warp, window)[i];
    const PrefixSum of_threads = cta_prefix_sum({sum, 0}, shared.sums);
    int next = of_threads.before.edges;
    for (int i = own.begin; i < own.end; ++i) {
        const int first = next;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
            uint16_t& counter = WarpCounters(shared, warp, window)[i];
            const int count = counter;
            counter = static_cast<uint16_t>(next);
            next += count;
        }
        shared.base[i] = shared.cta_next[i] - first;
        shared.cta_next[i] += next - first;
    }
    return of_threads.total.edges;
}

// Stores the edges of a tile as `sorted` has them, in the order of the queries. They are in this order there but for those
// that a warp counted at once, which are less than 32 from each other: such neighbours are looked for.
__device__ __forceinline__ void store_edges(
    int32_t* csr_edges, const FillMemory& shared, const Run& edges, int num_edges) {
    constexpr int kBatch = 4;
    for (int first = threadIdx.x; first < num_edges; first += kBatch * kThreads) {
        int own[kBatch], left[kBatch], right[kBatch], base[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int* const at = shared.sorted + min(first + k * kThreads, num_edges - 1);
            own[k] = at[0];
            left[k] = at[-1];
            right[k] = at[1];
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) base[k] = shared.base[own[k] >> 16];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int i = first + k * kThreads;
            if (i >= num_edges) break;
            int position = i;
            for (int j = i - 1, other = left[k]; other > own[k] - 32; other = shared.sorted[--j])
                position -= other > own[k];
            for (int j = i + 1, other = right[k]; other < own[k] + 32; other = shared.sorted[++j])
                position += other < own[k];
            csr_edges[base[k] + position] = edges.begin + (own[k] & 0xffff);
        }
    }
}

// Two CTAs an SM: tiling.plan_parts makes at most that many where one window has all blocks.
__global__ void __launch_bounds__(kThreads, 2) plan_fill(const __grid_constant__ PlanParams chunks) {
    await_kernel_before();
    const PlanParams p = params_of_chunk(chunks, blockIdx.x / chunks.parts);
    if (blockIdx.y >= p.geometry.num_heads * p.num_ranges) return;
    const Share share = own_share(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, window = share.window;
    const FillMemory shared = carve_fill_memory(dynamic_shared_memory(), window);
    const WarpCounters counters(shared, warp, window);

    load_offsets(shared.offsets, shared.sums, p, share);
    store_work_items(shared.offsets, p, share);
    for (int i = threadIdx.x; i < window; i += kThreads) {
        shared.cta_next[i] = shared.offsets[i].edges + p.counts[share.counts + i];
    }

    const int tile_queries = min(kTileQueries, kTileEdges / p.geometry.topk);
    for_each_tile(p, share, shared.tile_blocks, tile_queries, [&](const Tile& tile, const Run& edges) {
        const Run own = split(edges, kWarps, warp);
        for (int i = threadIdx.x; i < kWarps / 2 * window; i += kThreads) shared.warp_counters[i] = 0;
        __syncthreads();
        LaneEdges counted;
        count_edges(counted, tile, own, counters);
        __syncthreads();
        const int num_edges = counts_to_positions(shared, window);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kLaneEdges; ++i) {
            if (counted[i] == kNoEdge) continue;
            const int block = counted[i] >> 16, position = counters[block] + (counted[i] & 0xffff);
            shared.sorted[position] = block << 16 | (own.begin + 32 * i + lane - edges.begin);
        }
        if (threadIdx.x == 0) {
            shared.sorted[-1] = INT_MIN;
            shared.sorted[num_edges] = INT_MAX;
        }
        __syncthreads();
        store_edges(p.csr_edges, shared, edges, num_edges);
    });
}

}  // namespace plan
}  // namespace fsa
