#include "backward/reduce.h"

#include "device/convert.cuh"
#include "device/key_value_gradients.cuh"
#include "device/slots.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fsa {
namespace {

constexpr int kThreads = 256;
constexpr int kSlices = 8;  // CTAs that share a cell: the pieces of a block that everyone selected are megabytes

template <typename T, int kLanes>
__global__ void __launch_bounds__(ReduceTraits<kLanes>::kThreads, ReduceTraits<kLanes>::kMinCtas)
    backward_reduce_dq(const __grid_constant__ BackwardReduceParams p) {
    await_kernel_before();
    constexpr int kBatch = ReduceTraits<kLanes>::kBatch;
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % kLanes, column = 8 * lane, num_partials = g.topk * g.subs;
    const int64_t stride = static_cast<int64_t>(g.group_size) * g.head_dim;

    int block_id = load_block_id(g, p.topk_idx, row_of_tile<kLanes>(g, blockIdx.x), lane);
    for (int tile = blockIdx.x; tile < ReduceTraits<kLanes>::num_tiles(g); tile += gridDim.x) {
        const int row = row_of_tile<kLanes>(g, tile);
        const SlotRow slots = load_slot_row(g, row);
        float dq[8] = {};
        for (int first = 0; first < num_partials; first += kBatch) {
            const bool exists = lane < kBatch && partial_exists(g, slots, block_id, first + lane);
            block_id = first + kBatch < num_partials
                           ? load_block_id(g, p.topk_idx, row, first + kBatch + lane)
                           : load_block_id(g, p.topk_idx, row_of_tile<kLanes>(g, tile + gridDim.x), lane);
            uint4 chunks[kBatch];
            const int64_t first_partial = slots.first_partial + static_cast<int64_t>(first) * g.group_size;
            load_partials<kLanes>(
                chunks, static_cast<const T*>(p.dq_partial) + first_partial * g.head_dim + column, stride, exists,
                column < g.head_dim);
#pragma unroll
            for (const uint4& chunk : chunks) add_chunk<T>(dq, chunk, 1.f);
        }
        const RowPosition position = position_of_row(g, row);
        const int64_t token = g.query_begin + position.query, head = query_head(g, position);
        const int64_t num_query_heads = static_cast<int64_t>(p.num_kv_heads) * g.group_size;
        if (column < g.head_dim)
            store_chunk(static_cast<T*>(p.dq) + (token * num_query_heads + head) * g.head_dim + column, dq);
    }
}

// A CTA a cell and slice of its elements; cells of a single work item were written by main.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_reduce_dkv(BackwardReduceParams p) {
    await_kernel_before();
    const Geometry& g = p.geometry;
    const KeyValueGradients& out = p.gradients;
    const int cell = blockIdx.x, begin = p.csr_offsets[cell], num_edges = p.csr_offsets[cell + 1] - begin;
    if (num_edges <= p.edges_per_item) return;

    const int num_pieces = (num_edges + p.edges_per_item - 1) / p.edges_per_item;
    const int64_t piece = first_piece(begin, p.edges_per_item);
    const int head = cell / g.num_blocks, block = cell - head * g.num_blocks;
    const int sequence = sequence_of_block(g.sequences, block, g.block_size);
    const SequenceBounds bounds = sequence_bounds(g.sequences, sequence);
    const int first_key = (block - first_block(g.sequences, sequence, g.block_size)) * g.block_size;
    const int num_keys = min(bounds.num_keys - first_key, g.block_size);
    const int pairs = g.head_dim / 2;
    const int64_t piece_stride = static_cast<int64_t>(g.subs) * 2 * out.tile_k * g.head_dim;

    for (int i = blockIdx.y * kThreads + threadIdx.x; i < 2 * num_keys * pairs; i += kSlices * kThreads) {
        const int which = i / (num_keys * pairs), key = i / pairs - which * num_keys, column = i % pairs * 2;
        const float* from =
            piece_row(out, g.subs, g.head_dim, piece, key / out.tile_k, which, key % out.tile_k) + column;
        float2 sum = make_float2(0.f, 0.f);
        for (int k = 0; k < num_pieces; ++k) {
            const float2 x = __ldcs(reinterpret_cast<const float2*>(from + k * piece_stride));
            sum.x += x.x;
            sum.y += x.y;
        }
        const int64_t token = bounds.key_begin + first_key + key;
        const int64_t element = token * out.token_stride + head * out.head_stride + column;
        store_gradient_pair<T>(which == 0 ? out.dk : out.dv, element, out.accumulate, sum.x, sum.y);
    }
}

}  // namespace

template <typename T>
void launch_backward_reduce(const BackwardReduceParams& p, cudaStream_t stream) {
    const Geometry& g = p.geometry;
    dispatch_row_lanes(g.head_dim, [&](auto lanes) {
        using Traits = ReduceTraits<decltype(lanes)::value>;
        const int ctas = min(Traits::num_tiles(g), sm_count() * Traits::kMinCtas);
        launch("backward_reduce_dq", backward_reduce_dq<T, lanes>, {dim3(ctas), Traits::kThreads, 0}, p, stream);
    });
    launch(
        "backward_reduce_dkv", backward_reduce_dkv<T>, {dim3(g.num_heads * g.num_blocks, kSlices), kThreads, 0}, p,
        stream);
}

template void launch_backward_reduce<__half>(const BackwardReduceParams&, cudaStream_t);
template void launch_backward_reduce<__nv_bfloat16>(const BackwardReduceParams&, cudaStream_t);

}  // namespace fsa
