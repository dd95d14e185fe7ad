// dK and dV of a work item, from the accumulators of a warp to memory.
#pragma once

#include "device/key_value_gradients.cuh"
#include "device/work_item.cuh"
#include "params.h"

namespace fsa {
namespace backward_main {

// Where an item's dK and dV go: to its piece when its cell is cut into several items, else to the result.
struct GradientTarget {
    bool cut;
    int64_t piece;
};

// Where the edges of the item's cell begin and end, to shared memory, asynchronously.
__device__ __forceinline__ void load_cell_edges(int (&cell_edges)[2], const PlanView& plan, const WorkItem& item) {
    if (const int thread = thread_index_unhoisted(); thread < 2)
        cp_async_4(shared_address(&cell_edges[thread]), plan.csr_offsets + item.cell + thread);
}

__device__ __forceinline__ GradientTarget
gradient_target(const int (&cell_edges)[2], const PlanView& plan, const WorkItem& item) {
    const int cell_begin = cell_edges[0], cell_end = cell_edges[1];
    return {
        cell_end - cell_begin > plan.edges_per_item,
        first_piece(cell_begin, plan.edges_per_item) + (item.edge_begin - cell_begin) / plan.edges_per_item};
}

// What a lane holds of kTiles accumulators of n8 tiles of dk (which = 0) or dv (1): rows key and key + 8, columns
// first_column + 8 n and the one behind it.
template <typename T, int kTiles>
__device__ __forceinline__ void store_key_gradient(
    const float (&gradient)[kTiles][4], int which, int key, int first_column, const BackwardMainParams& p,
    const WorkItem& item, const GradientTarget& target) {
    const Geometry& g = p.geometry;
    const KeyValueGradients& out = p.gradients;
    const float scale = which == 0 ? p.softmax_scale : 1.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = key + half * 8;
        if (!target.cut && row >= item.num_keys) continue;
        const int64_t token = item.key_token + row;
        const int64_t element = token * out.token_stride + item.head * out.head_stride + first_column;
        void* result = which == 0 ? out.dk : out.dv;
        float* piece_elements = piece_row(out, g.subs, g.head_dim, target.piece, item.sub, which, row) + first_column;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const float x = gradient[n][2 * half] * scale, y = gradient[n][2 * half + 1] * scale;
            if (first_column + n * 8 >= g.head_dim) break;
            if (target.cut) {
                *reinterpret_cast<float2*>(piece_elements + n * 8) = make_float2(x, y);
            } else {
                store_gradient_pair<T>(result, element + n * 8, out.accumulate, x, y);
            }
        }
    }
}

}  // namespace backward_main
}  // namespace fsa
