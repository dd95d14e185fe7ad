#include "forward/reduce.h"

#include "device/convert.cuh"
#include "device/slots.cuh"
#include "device/softmax.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fsa {
namespace {

// Sums of 512 slots of 8 sub-blocks exceed their largest value by at most 2^12: they are made that much smaller.
constexpr int kHeadroom = 12;

template <int kLanes>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

template <int kLanes>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(ReduceTraits<kLanes>::kThreads, ReduceTraits<kLanes>::kMinCtas)
    forward_reduce(const __grid_constant__ ForwardReduceParams p) {
    await_kernel_before();
    constexpr int kBatch = ReduceTraits<kLanes>::kBatch;
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % kLanes, column = 8 * lane, num_partials = g.topk * g.subs;
    const int64_t stride = static_cast<int64_t>(g.group_size) * g.head_dim;

    int block_id = load_block_id(g, p.topk_idx, row_of_tile<kLanes>(g, blockIdx.x), lane);
    for (int tile = blockIdx.x; tile < ReduceTraits<kLanes>::num_tiles(g); tile += gridDim.x) {
        const int row = row_of_tile<kLanes>(g, tile);
        const SlotRow slots = load_slot_row(g, row);
        float out[8] = {}, maximum = -INFINITY, shift = 0.f, sum = 0.f;
        for (int first = 0; first < num_partials; first += kBatch) {
            const int i = first + lane;
            const bool exists = lane < kBatch && partial_exists(g, slots, block_id, i);
            float lse = -INFINITY;
            int exponent = 0;
            if (exists) {
                const int sub = i - g.by_subs.quotient(i) * g.subs;
                lse = __ldg(p.lse_partial + slots.first_partial + i * g.group_size);
                exponent = __ldg(p.value_exponent + (slots.first_cell + block_id) * g.subs + sub);
            }
            block_id = first + kBatch < num_partials
                           ? load_block_id(g, p.topk_idx, row, first + kBatch + lane)
                           : load_block_id(g, p.topk_idx, row_of_tile<kLanes>(g, tile + gridDim.x), lane);
            uint4 chunks[kBatch];
            const int64_t first_partial = slots.first_partial + static_cast<int64_t>(first) * g.group_size;
            load_partials<kLanes>(
                chunks, p.o_partial + first_partial * g.head_dim + column, stride, exists, column < g.head_dim);

            // A branch, behind which the compiler leaves what waits for lse: in front of it, all loads.
            if (!__any_sync(~0u, exists)) continue;

            const float maximum_before = maximum;
            maximum = fmaxf(maximum, group_max<kLanes>(lse));
            shift = finite_shift(maximum);
            const float kept = exp2_approx(maximum_before - shift);
            float weight = exp2_approx(lse - shift);
            sum = fmaf(sum, kept, weight);
            weight *= power_of_two(exponent - kHeadroom);
#pragma unroll
            for (float& x : out) x *= kept;
#pragma unroll
            for (int k = 0; k < kBatch; ++k) add_chunk<__half>(out, chunks[k], __shfl_sync(~0u, weight, k, kLanes));
        }
        sum = group_sum<kLanes>(sum);

        const float scale = reciprocal_or_zero(sum) * power_of_two(kHeadroom);
#pragma unroll
        for (float& x : out) x *= scale;
        const RowPosition position = position_of_row(g, row);
        const int64_t token = g.query_begin + position.query, head = query_head(g, position);
        const int64_t num_query_heads = static_cast<int64_t>(p.num_kv_heads) * g.group_size;
        if (column < g.head_dim)
            store_chunk(static_cast<T*>(p.out) + (token * num_query_heads + head) * g.head_dim + column, out);
        if (lane == 0) p.lse[head * g.sequences.total_q + token] = log2_sum_exp(shift, sum) * kLn2;
    }
}

}  // namespace

template <typename T>
void launch_forward_reduce(const ForwardReduceParams& p, cudaStream_t stream) {
    dispatch_row_lanes(p.geometry.head_dim, [&](auto lanes) {
        using Traits = ReduceTraits<decltype(lanes)::value>;
        const int ctas = min(Traits::num_tiles(p.geometry), sm_count() * Traits::kMinCtas);
        launch("forward_reduce", forward_reduce<T, lanes>, {dim3(ctas), Traits::kThreads, 0}, p, stream);
    });
}

template void launch_forward_reduce<__half>(const ForwardReduceParams&, cudaStream_t);
template void launch_forward_reduce<__nv_bfloat16>(const ForwardReduceParams&, cudaStream_t);

}  // namespace fsa
