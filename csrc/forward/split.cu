// A CTA a query tile and KV head, a thread a query. A table in shared memory keeps, for every block, one bit a query that
// selects it; runs of queries with enough bits share the block. Only a query's own thread sets its bits, and entries are
// numbered by the first query that shares the block, so no result depends on the order in which threads run.
#include "forward/split.h"

#include "device/chunk_grid.cuh"
#include "device/ptx.cuh"
#include "device/sequence.cuh"
#include "launch.h"

namespace fsa {
namespace {

constexpr int kThreads = kQueryTile;
// Blocks that the tables hold at a time: 16 bytes of shared memory each. Longer sequences are taken window by window.
constexpr int kWindow = 2048;
constexpr int kBatch = 16;      // slots a query whose ids lie in shared memory at a time
using QueryBits = unsigned[2];  // of a tile: query i is bit i % 32 of word i / 32
static_assert(kQueryTile == 64, "two words a tile");

using Batch = int[kQueryTile][kBatch + 1];  // an odd pitch, since a thread reads along a row

struct SplitMemory {
    QueryBits* selected;  // [window]: the queries that select a block
    QueryBits* sharing;   // [window]: those of them that share it
    Batch* ids;           // of a batch, as in topk_idx
    Batch* scattered;     // scattered_idx of the tile, if a batch holds it
    int* owned;           // [kQueryTile / 32]
};

constexpr int split_memory_bytes(int window) {
    return static_cast<int>(2 * window * sizeof(QueryBits) + 2 * sizeof(Batch) + kQueryTile / 32 * sizeof(int));
}

__device__ __forceinline__ SplitMemory carve_split_memory(void* shared, int window) {
    SplitMemory m;
    m.selected = static_cast<QueryBits*>(shared);
    m.sharing = m.selected + window;
    m.ids = reinterpret_cast<Batch*>(m.sharing + window);
    m.scattered = m.ids + 1;
    m.owned = reinterpret_cast<int*>(m.scattered + 1);
    return m;
}

// A query tile of topk_idx and scattered_idx, in batches of slots.
struct TileSlots {
    int64_t first_row;  // of both tensors
    int num_queries;
    int topk;

    // Calls f(index, row, slot) for the thread's share of a batch, in the order of memory: row, slot of the batch, index of
    // the whole.
    template <typename F>
    __device__ __forceinline__ void for_each(int first, F&& f) const {
#pragma unroll
        for (int i = 0; i < kQueryTile * kBatch / kThreads; ++i) {
            const int row = (i * kThreads + static_cast<int>(threadIdx.x)) / kBatch, slot = threadIdx.x % kBatch;
            if (row < num_queries && first + slot < topk) f(i, (first_row + row) * topk + first + slot, row, slot);
        }
    }

    __device__ __forceinline__ void load(Batch& batch, const int32_t* topk_idx, int first) const {
        int ids[kQueryTile * kBatch / kThreads];  // all on their way together
        for_each(first, [&](int i, int64_t index, int, int) { ids[i] = __ldg(topk_idx + index); });
        for_each(first, [&](int i, int64_t, int row, int slot) { batch[row][slot] = ids[i]; });
    }

    __device__ __forceinline__ void store(int32_t* scattered_idx, const Batch& batch) const {
        for_each(0, [&](int, int64_t index, int row, int slot) { scattered_idx[index] = batch[row][slot]; });
    }
};

// What a thread knows of its query.
struct TileQuery {
    int first_cell;   // of its sequence's block 0, among the blocks of all sequences
    int num_visible;  // blocks it sees; 0 for a thread behind the last query
    int sequence;
    int word;
    unsigned bit;
    QueryBits run;  // the queries of its run
};

__device__ __forceinline__ TileQuery load_tile_query(const Geometry& g, int query, int run_queries) {
    TileQuery q = {0, 0, 0, static_cast<int>(threadIdx.x) / 32, 1u << threadIdx.x % 32, {~0u, ~0u}};
    if (run_queries < kQueryTile) {
        const int first = static_cast<int>(threadIdx.x) % 32 / run_queries * run_queries;
        const unsigned run = ~0u >> (32 - run_queries) << first;
        q.run[0] = q.word == 0 ? run : 0;
        q.run[1] = q.word == 1 ? run : 0;
    }
    if (query >= g.num_queries) return q;
    const int token = g.query_begin + query;
    q.sequence = sequence_of_query(g.sequences, token);
    q.first_cell = first_block(g.sequences, q.sequence, g.block_size);
    const int last_key = last_visible_key(sequence_bounds(g.sequences, q.sequence), token, g.causal);
    q.num_visible = visible_blocks(g.block_size, last_key);
    return q;
}

// Calls f(id) for each slot of the thread's query.
template <typename F>
__device__ __forceinline__ void for_each_slot(
    const ForwardSplitParams& p, const SplitMemory& shared, const TileSlots& tile, F&& f) {
    for (int first = 0; first < tile.topk; first += kBatch) {
        if (tile.topk > kBatch) {  // else they are there
            __syncthreads();
            tile.load(*shared.ids, p.topk_idx, first);
            __syncthreads();
        }
        const int query = threadIdx.x, size = query < tile.num_queries ? min(kBatch, tile.topk - first) : 0;
#pragma unroll 2
        for (int slot = 0; slot < size; ++slot) f((*shared.ids)[query][slot]);
    }
}

__device__ __forceinline__ int first_query_of(const QueryBits& queries) {
    return __ffsll(static_cast<long long>(queries[1]) << 32 | queries[0]) - 1;  // -1: none
}

// Sum of `value` over the threads before this one; `total` over all.
__device__ __forceinline__ int prefix_sum(int value, int* owned, int& total) {
    int inclusive = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(~0u, inclusive, step);
        if (threadIdx.x % 32 >= static_cast<unsigned>(step)) inclusive += left;
    }
    if (threadIdx.x % 32 == 31) owned[threadIdx.x / 32] = inclusive;
    __syncthreads();
    total = owned[0] + owned[1];
    return inclusive - value + (threadIdx.x >= 32 ? owned[0] : 0);
}

// The buffers of one chunk, whose geometry this is.
__device__ __forceinline__ SharedBlocks shared_of_chunk(const ForwardSplitParams& p, const Geometry& g, int chunk) {
    const Geometry& first = p.geometry;
    const int64_t tiles = static_cast<int64_t>(first.num_heads) * p.shared.num_tiles;
    SharedBlocks s = p.shared;
    s.num_tiles = (g.num_queries - 1) / kQueryTile + 1;
    s.blocks += chunk * tiles * s.max_blocks;
    s.counts += chunk * tiles;
    s.scattered_counts += chunk * static_cast<int64_t>(first.num_heads) * first.num_queries;
    s.next += chunk;
    return s;
}

__global__ void __launch_bounds__(kThreads) forward_split(const __grid_constant__ ForwardSplitParams p) {
    await_kernel_before();
    const int chunk = blockIdx.z, tile = blockIdx.x, head = blockIdx.y, query = tile * kQueryTile + threadIdx.x;
    const Geometry g = geometry_of_chunk(p.geometry, p.grid, chunk);
    if (head >= g.num_heads || tile * kQueryTile >= g.num_queries) return;
    const SharedBlocks out = shared_of_chunk(p, g, chunk);
    const TileSlots slots = {
        static_cast<int64_t>(g.head_begin + head) * g.sequences.total_q + g.query_begin + tile * kQueryTile,
        min(g.num_queries - tile * kQueryTile, kQueryTile), g.topk};
    const int window = min(g.num_blocks, kWindow);
    const SplitMemory shared = carve_split_memory(dynamic_shared_memory(), window);
    const bool fits = g.topk <= kBatch;
    if (fits) slots.load(*shared.ids, p.topk_idx, 0);
    const TileQuery own = load_tile_query(g, query, p.run_queries);
    const int64_t head_and_tile = static_cast<int64_t>(head) * out.num_tiles + tile;
    int4* entries = out.blocks + head_and_tile * out.max_blocks;
    // Of the thread's query. By way of shared memory, if they fit, since a thread's own do not lie side by side with others'.
    int32_t* const scattered =
        fits ? (*shared.scattered)[threadIdx.x] : p.scattered_idx + (slots.first_row + threadIdx.x) * g.topk;
    int num_entries = 0, num_scattered = 0;

    for (int window_begin = 0; window_begin < g.num_blocks; window_begin += kWindow) {
        __syncthreads();  // the tables of the window before are done with, and ids are there
        // The block of the window that a slot selects, -1: none.
        const auto block_of = [&](int id) {
            if (static_cast<unsigned>(id) >= static_cast<unsigned>(own.num_visible)) return -1;
            const unsigned block = static_cast<unsigned>(own.first_cell + id - window_begin);
            return block < static_cast<unsigned>(window) ? static_cast<int>(block) : -1;
        };
        for (int i = threadIdx.x; i < window; i += kThreads)  // of both tables
            reinterpret_cast<uint4*>(shared.selected)[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        for_each_slot(p, shared, slots, [&](int id) {
            const int block = block_of(id);
            if (block >= 0) atomicOr(&shared.selected[block][own.word], own.bit);
        });

        __syncthreads();
        // A block listed twice by a query is shared once: the second slot stays with main.
        for_each_slot(p, shared, slots, [&](int id) {
            const int block = block_of(id);
            if (block < 0) return;
            const QueryBits& queries = shared.selected[block];
            bool is_shared = __popc(queries[0] & own.run[0]) + __popc(queries[1] & own.run[1]) >= p.min_queries;
            if (is_shared) is_shared = !(atomicOr(&shared.sharing[block][own.word], own.bit) & own.bit);
            if (!is_shared) scattered[num_scattered++] = id;
        });

        __syncthreads();
        // A shared block is entered by the first query that shares it, which marks that in its bit of `selected`: cleared
        // when the entry is counted, set when it is written.
        const auto is_owned = [&](int block) {
            return block >= 0 && first_query_of(shared.sharing[block]) == static_cast<int>(threadIdx.x);
        };
        int owned = 0;
        for_each_slot(p, shared, slots, [&](int id) {
            const int block = block_of(id);
            if (is_owned(block)) owned += (atomicAnd(&shared.selected[block][own.word], ~own.bit) & own.bit) != 0;
        });
        int owned_by_all;
        int entry = num_entries + prefix_sum(owned, shared.owned, owned_by_all);
        for_each_slot(p, shared, slots, [&](int id) {
            const int block = block_of(id);
            if (owned == 0 || !is_owned(block)) return;
            if (atomicOr(&shared.selected[block][own.word], own.bit) & own.bit) return;
            const QueryBits& queries = shared.sharing[block];
            entries[entry++] = make_int4(
                window_begin + block, own.sequence, static_cast<int>(queries[0]), static_cast<int>(queries[1]));
        });
        num_entries += owned_by_all;
    }
    // Shared looks at the first entries before it knows how many there are.
    for (int i = num_entries + static_cast<int>(threadIdx.x); i < min(out.max_blocks, 32); i += kThreads)
        entries[i] = make_int4(0, 0, 0, 0);
    if (threadIdx.x == 0) out.counts[head_and_tile] = num_entries;
    if (threadIdx.x == 0 && tile == 0 && head == 0) *out.next = 0;
    if (query < g.num_queries) {
        out.scattered_counts[static_cast<int64_t>(head) * g.num_queries + query] = num_scattered;
        for (int i = 0; i < g.topk; ++i)
            if (i >= num_scattered) scattered[i] = -1;
    }
    __syncthreads();
    if (fits) slots.store(p.scattered_idx, *shared.scattered);
}

}  // namespace

void launch_forward_split(const ForwardSplitParams& p, cudaStream_t stream) {
    const Geometry& g = p.geometry;
    const dim3 ctas(p.shared.num_tiles, g.num_heads, p.grid.num_chunks);
    const int bytes = split_memory_bytes(min(g.num_blocks, kWindow));
    launch("forward_split", forward_split, {ctas, kThreads, bytes}, p, stream);
}

}  // namespace fsa
