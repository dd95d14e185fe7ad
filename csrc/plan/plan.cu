// A stable counting sort of the edges by cell, where a cell is (KV head, query range, KV block).
//
// A part is a run of query tokens inside a range, which one CTA counts (plan_count) and later fills in (plan_fill);
// there, every warp owns a run of its own. Prefix sums over the cells, over the parts of a cell (plan_prefix) and over
// the warps of a part say where each warp writes, so the edges of a cell come in the order of the queries and no two
// runs of the program differ. Nothing is sorted by comparison and no result depends on the order of atomics. plan_fill puts
// some queries' edges in order in shared memory first: then those of a cell are stored together.
#include "plan/plan.h"

#include "device/chunk_grid.cuh"
#include "device/ptx.cuh"
#include "device/sequence.cuh"
#include "launch.h"

namespace fsa {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
// Blocks that a CTA counts in shared memory: in plan_fill 8 warps x 2048 x 2 bytes = 32 KB of it, of 88 in all. Longer
// sequences (131,072 tokens in blocks of 64) are counted window by window.
constexpr int kWindow = 2048;
static_assert(kWindow % kPlanGroup == 0, "the cells before a window are whole groups");
constexpr int kTileQueries = 1024;  // queries whose visible blocks lie in shared memory: 8 KB
constexpr int kTileEdges = 8192;    // edges that plan_fill sorts in shared memory: 32 KB
// Block ids that a thread asks for at a time: plan_count waits for memory, plan_fill for L2, and its code is longer.
constexpr int kCountInFlight = 16;
constexpr int kFillInFlight = 8;
constexpr int kPrefixWarps = 16;  // of plan_prefix, where every warp sums some of the parts
constexpr int kPrefixThreads = kPrefixWarps * 32;

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
    return {edges, (edges + p.edges_per_item - 1) / p.edges_per_item};
}

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
            p.work_items[item] =
                make_int4(share.head * g.num_blocks + block, edge, min(edge + p.edges_per_item, end.edges), sequence);
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
    int* cta_next;             // [window]: where the next tile's first edge of a block goes
    int* base;                 // [window]: what a block's edges are from where they lie in `sorted`
    // [kWarps / 2][window][2]: a warp's edges of a block in the tile, then where the next of them goes in `sorted`.
    uint16_t* warp_next;
    EdgesAndItems* offsets;  // [window + 1], before the first tile
    uint32_t* sorted;  // [kTileEdges]: block << 16 | edge, counted from the tile's first, by block; where offsets were
};

constexpr int fill_memory_bytes(int window) {
    constexpr int kSorted = kTileEdges * static_cast<int>(sizeof(uint32_t));
    const int offsets = (window + 1) * static_cast<int>(sizeof(EdgesAndItems));
    return kTileQueries * static_cast<int>(sizeof(QueryBlocks)) + kWarps * static_cast<int>(sizeof(EdgesAndItems)) +
           window * static_cast<int>(2 * sizeof(int) + kWarps * sizeof(uint16_t)) +
           (offsets > kSorted ? offsets : kSorted);
}
static_assert(fill_memory_bytes(kWindow) <= 99 * 1024, "what a CTA of any GPU from sm_80 on may have");
static_assert(kWindow <= 1 << 16 && kTileEdges <= 1 << 16, "16 bits each");

__device__ __forceinline__ FillMemory carve_fill_memory(void* shared, int window) {
    FillMemory m;
    m.tile_blocks = static_cast<QueryBlocks*>(shared);
    m.sums = reinterpret_cast<EdgesAndItems*>(m.tile_blocks + kTileQueries);
    m.offsets = m.sums + kWarps;
    m.sorted = reinterpret_cast<uint32_t*>(m.offsets);
    const int common = max((window + 1) * static_cast<int>(sizeof(EdgesAndItems)), kTileEdges * 4);
    m.cta_next = reinterpret_cast<int*>(reinterpret_cast<char*>(m.offsets) + common);
    m.base = m.cta_next + window;
    m.warp_next = reinterpret_cast<uint16_t*>(m.base + window);
    return m;
}

// The counters of a warp, as it adds to them and as it reads them: of two warps in a word.
struct WarpCounters {
    uint32_t* words;
    int half;

    __device__ __forceinline__ WarpCounters(const FillMemory& shared, int warp, int window)
        : words(reinterpret_cast<uint32_t*>(shared.warp_next) + warp / 2 * window), half(warp % 2) {}
    __device__ __forceinline__ void increment(int block) const {
        atomicAdd(&words[block], 1u << 16 * half);
    }
    __device__ __forceinline__ uint16_t& operator[](int block) const {
        return reinterpret_cast<uint16_t*>(words + block)[half];
    }
};

// What the warps counted in a tile becomes where they write: blocks one after the other, and in a block a warp starts where the
// one before ends. Returns the edges of the tile.
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

// Two CTAs an SM: tiling.plan_parts makes that many.
__global__ void __launch_bounds__(kThreads, 2) plan_fill(const __grid_constant__ PlanParams chunks) {
    await_kernel_before();
    const PlanParams p = params_of_chunk(chunks, blockIdx.x / chunks.parts);
    if (blockIdx.y >= p.geometry.num_heads * p.num_ranges) return;
    const Share share = own_share(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, window = share.window;
    const FillMemory shared = carve_fill_memory(dynamic_shared_memory(), window);
    const WarpCounters next(shared, warp, window);

    load_offsets(shared.offsets, shared.sums, p, share);
    store_work_items(shared.offsets, p, share);
    for (int i = threadIdx.x; i < window; i += kThreads) {
        shared.cta_next[i] = shared.offsets[i].edges + p.counts[share.counts + i];
    }

    const int tile_queries = max(1, min(kTileQueries, kTileEdges / p.geometry.topk));
    for_each_tile(p, share, shared.tile_blocks, tile_queries, [&](const Tile& tile, const Run& edges) {
        const Run own = split(edges, kWarps, warp);
        for (int i = threadIdx.x; i < kWarps / 2 * window; i += kThreads)
            reinterpret_cast<uint32_t*>(shared.warp_next)[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int first = own.begin + lane; first - lane < own.end; first += kFillInFlight * 32) {
            int blocks[kFillInFlight];
            tile.load_blocks<32>(blocks, first, own.end);
#pragma unroll
            for (const int block : blocks) {
                if (block >= 0) next.increment(block);
            }
        }
        __syncthreads();
        const int num_edges = counts_to_positions(shared, window);
        __syncthreads();

#pragma unroll 1
        for (int first = own.begin + lane; first - lane < own.end; first += kFillInFlight * 32) {
            int blocks[kFillInFlight];
            unsigned peers[kFillInFlight];  // lanes whose edges belong to the same cell
            tile.load_blocks<32>(blocks, first, own.end);
#pragma unroll
            for (int i = 0; i < kFillInFlight; ++i) peers[i] = __match_any_sync(~0u, blocks[i]);
#pragma unroll
            for (int i = 0; i < kFillInFlight; ++i) {
                const int block = blocks[i], rank = __popc(peers[i] & ((1u << lane) - 1));
                const int position = block >= 0 ? next[block] : 0;
                if (block >= 0)
                    shared.sorted[position + rank] =
                        static_cast<uint32_t>(block) << 16 | (first + i * 32 - edges.begin);
                __syncwarp();
                if (block >= 0 && rank == 0) next[block] = static_cast<uint16_t>(position + __popc(peers[i]));
                __syncwarp();
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num_edges; i += kThreads) {
            const uint32_t edge = shared.sorted[i];
            p.csr_edges[shared.base[edge >> 16] + i] = edges.begin + static_cast<int>(edge & 0xffff);
        }
    });
}

}  // namespace

void launch_plan(const PlanParams& p, cudaStream_t stream) {
    const Geometry& g = p.geometry;
    const int heads_and_ranges = g.num_heads * p.num_ranges;
    const dim3 shares(p.parts * p.grid.num_chunks, heads_and_ranges, (g.num_blocks - 1) / kWindow + 1);
    const dim3 groups(((g.num_blocks - 1) / kPlanGroup + 1) * p.grid.num_chunks, heads_and_ranges);
    const int fill_bytes = fill_memory_bytes(min(kWindow, g.num_blocks));
    launch("plan_count", plan_count, {shares, kThreads, 0}, p, stream);
    launch("plan_prefix", plan_prefix, {groups, kPrefixThreads, 0}, p, stream);
    launch("plan_fill", plan_fill, {shares, kThreads, fill_bytes}, p, stream);
}

}  // namespace fsa
