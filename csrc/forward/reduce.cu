#include "forward/reduce.h"

#include "device/convert.cuh"
#include "device/slots.cuh"
#include "device/softmax.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fsa {
namespace {

constexpr int kThreads = 256;
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

// kLanes lanes a (query, head) row, lane i on columns 8i .. 8i+7; rows behind the last repeat it and store nothing.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) forward_reduce(ForwardReduceParams p) {
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % kLanes, num_partials = g.topk * g.subs;
    const int num_rows = g.num_heads * g.num_queries * g.group_size;
    const int own_row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
    const SlotRow row = load_slot_row(g, p.topk_idx, min(own_row, num_rows - 1));
    const int column = 8 * lane;
    const bool chunk_exists = column < g.head_dim;

    auto lse_of = [&](const SlotPartial& s) { return s.used ? __ldg(p.lse_partial + s.row) : -INFINITY; };

    float maximum = -INFINITY;
    for (int first = 0; first < num_partials; first += kLanes) {
        maximum = fmaxf(maximum, lse_of(load_slot_partial(g, row, first + lane)));
    }
    const float shift = finite_shift(group_max<kLanes>(maximum));

    float out[8] = {}, sum = 0.f;
    for (int first = 0; first < num_partials; first += kLanes) {
        const SlotPartial partial = load_slot_partial(g, row, first + lane);
        float weight = 0.f;
        if (partial.used) {
            weight = exp2_approx(lse_of(partial) - shift);
            sum += weight;
            const int64_t cell = static_cast<int64_t>(row.head) * g.num_blocks + partial.block;
            weight = ldexpf(weight, __ldg(p.value_exponent + cell * g.subs + partial.sub) - kHeadroom);
        }
        const __half* chunk =
            p.o_partial + (row.partial_row + static_cast<int64_t>(first) * g.group_size) * g.head_dim + column;
        accumulate_partials<__half, kLanes>(
            out, chunk, static_cast<int64_t>(g.group_size) * g.head_dim, weight, num_partials - first, chunk_exists);
    }
    sum = group_sum<kLanes>(sum);

    if (own_row >= num_rows) return;
    const float scale = ldexpf(reciprocal_or_zero(sum), kHeadroom);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] *= scale;
    const int64_t token = g.query_begin + row.query;
    const int64_t num_query_heads = static_cast<int64_t>(p.num_kv_heads) * g.group_size;
    const int64_t head = static_cast<int64_t>(g.head_begin + row.head) * g.group_size + row.group_head;
    if (chunk_exists)
        store_row_chunk(static_cast<T*>(p.out) + (token * num_query_heads + head) * g.head_dim + column, out);
    if (lane == 0) p.lse[head * g.sequences.total_q + token] = log2_sum_exp(shift, sum) * kLn2;
}

}  // namespace

template <typename T>
void launch_forward_reduce(const ForwardReduceParams& p, cudaStream_t stream) {
    const Geometry& g = p.geometry;
    const int num_rows = g.num_heads * g.num_queries * g.group_size;
    dispatch_row_lanes(g.head_dim, [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        const int ctas = (num_rows - 1) / (kThreads / kLanes) + 1;
        launch("forward_reduce", forward_reduce<T, kLanes>, {dim3(ctas), kThreads, 0}, p, stream);
    });
}

template void launch_forward_reduce<__half>(const ForwardReduceParams&, cudaStream_t);
template void launch_forward_reduce<__nv_bfloat16>(const ForwardReduceParams&, cudaStream_t);

}  // namespace fsa
