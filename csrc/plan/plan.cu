// A stable counting sort of the edges by cell, where a cell is (KV head, query range, KV block).
//
// A part is a run of query tokens inside a range, which one CTA counts (plan_count) and later fills in (plan_fill);
// there, every warp owns a run of its own. Prefix sums over the cells, over the parts of a cell (plan_prefix) and over
// the warps of a part say where each warp writes. In a warp, atomics rank the edges: those of one instruction, which are
// less than 32 apart, in any order, which plan_fill puts right as it stores them. So the edges of a cell come in the
// order of the queries, and no two runs of the program differ.
#include "plan/plan.h"

#include "device/ptx.cuh"
#include "launch.h"
#include "plan/fill.cuh"
#include "plan/parts.cuh"

namespace fsa {
namespace plan {

// Block ids that a thread asks for at a time: it waits for memory.
constexpr int kCountInFlight = 16;
constexpr int kPrefixWarps = 16;  // of plan_prefix, where every warp sums some of the parts
constexpr int kPrefixThreads = kPrefixWarps * 32;

__global__ void __launch_bounds__(kThreads) plan_count(const __grid_constant__ PlanParams chunks) {
    await_kernel_before();
    const PlanParams p = params_of_chunk(chunks, blockIdx.x / chunks.parts);
    if (blockIdx.y >= p.geometry.num_heads * p.num_ranges) return;  // a chunk of fewer heads
    __shared__ int counts[kWindow];
    __shared__ QueryBlocks tile_blocks[kTileQueries];
    const Share share = own_share(p);
    for (int i = threadIdx.x; i < share.window; i += kThreads) counts[i] = 0;
    for_each_tile(p, share, tile_blocks, kTileQueries, [&](const Tile& tile, const Run& edges) {
#pragma unroll 1
        for (int first = edges.begin + threadIdx.x; first < edges.end; first += kCountInFlight * kThreads) {
            int blocks[kCountInFlight];
            tile.load_blocks<kThreads>(blocks, first, edges.end);
#pragma unroll
            for (const int block : blocks) {
                if (block >= 0) atomicAdd(&counts[block], 1);
            }
        }
    });
    __syncthreads();
    for (int i = threadIdx.x; i < share.window; i += kThreads) p.counts[share.counts + i] = counts[i];
}

// A CTA a group of cells, a lane a cell: how many of the cell's edges stand in earlier parts, and how many there are.
__global__ void __launch_bounds__(kPrefixThreads) plan_prefix(const __grid_constant__ PlanParams chunks) {
    await_kernel_before();
    const int groups_a_range = (chunks.geometry.num_blocks - 1) / kPlanGroup + 1;
    const PlanParams p = params_of_chunk(chunks, blockIdx.x / groups_a_range);
    if (blockIdx.y >= p.geometry.num_heads * p.num_ranges) return;
    static_assert(kPlanGroup == 32, "a lane a cell");
    __shared__ int sums[kPrefixWarps][32];
    const Geometry& g = p.geometry;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = static_cast<int>(blockIdx.x) % groups_a_range, head_and_range = blockIdx.y;
    const int block = group * kPlanGroup + lane;
    const bool exists = block < g.num_blocks;
    const Run parts = split({0, p.parts}, kPrefixWarps, warp);
    int32_t* counts = p.counts + static_cast<int64_t>(head_and_range) * p.parts * g.num_blocks + block;

    auto for_each_count = [&](auto&& f) {
        constexpr int kBatch = 8;
        for (int first = parts.begin; first < parts.end; first += kBatch) {
            int batch[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int part = first + i;
                batch[i] = exists && part < parts.end ? counts[static_cast<int64_t>(part) * g.num_blocks] : 0;
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) f(batch[i], first + i);
        }
    };

    int sum = 0;
    for_each_count([&](int count, int) { sum += count; });
    sums[warp][lane] = sum;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; ++w) before += sums[w][lane];
    for_each_count([&](int count, int part) {
        if (exists && part < parts.end) counts[static_cast<int64_t>(part) * g.num_blocks] = before;
        before += count;
    });

    if (warp == kPrefixWarps - 1) {
        if (exists) p.cell_edges[static_cast<int64_t>(head_and_range) * g.num_blocks + block] = before;
        EdgesAndItems of_group = of_cell(before, p);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            of_group.edges += __shfl_xor_sync(~0u, of_group.edges, step);
            of_group.items += __shfl_xor_sync(~0u, of_group.items, step);
        }
        if (lane == 0) p.group_sums[static_cast<int64_t>(head_and_range) * groups_a_range + group] = of_group;
    }
}

}  // namespace plan

void launch_plan(const PlanParams& p, cudaStream_t stream) {
    const Geometry& g = p.geometry;
    const int heads_and_ranges = g.num_heads * p.num_ranges;
    const dim3 shares(p.parts * p.grid.num_chunks, heads_and_ranges, (g.num_blocks - 1) / plan::kWindow + 1);
    const dim3 groups(((g.num_blocks - 1) / kPlanGroup + 1) * p.grid.num_chunks, heads_and_ranges);
    const int fill_bytes = plan::fill_memory_bytes(min(plan::kWindow, g.num_blocks));
    launch("plan_count", plan::plan_count, {shares, plan::kThreads, 0}, p, stream);
    launch("plan_prefix", plan::plan_prefix, {groups, plan::kPrefixThreads, 0}, p, stream);
    launch("plan_fill", plan::plan_fill, {shares, plan::kThreads, fill_bytes}, p, stream);
}

}  // namespace fsa
