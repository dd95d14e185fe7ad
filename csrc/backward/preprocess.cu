#include "backward/preprocess.h"

#include "device/convert.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fsa {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 u = HalfType<T>::unpack(x[i]), v = HalfType<T>::unpack(y[i]);
        sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
    }
    return sum;
}

// kLanes lanes a (query, head) row, lane i on columns 8i .. 8i+7.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) backward_preprocess(BackwardPreprocessParams p) {
    await_kernel_before();
    const int64_t num_rows = static_cast<int64_t>(p.total_q) * p.num_heads;
    const int64_t own_row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    const int64_t row = min(own_row, num_rows - 1);
    const int64_t token = row / p.num_heads, head = row - token * p.num_heads;
    const int lane = threadIdx.x % kLanes, column = 8 * lane;

    float sum = 0.f;
    if (column < p.head_dim) {
        const T* out =
            static_cast<const T*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride + column;
        const T* dout =
            static_cast<const T*>(p.dout.data) + token * p.dout.token_stride + head * p.dout.head_stride + column;
        sum = dot<T>(__ldg(reinterpret_cast<const uint4*>(out)), __ldg(reinterpret_cast<const uint4*>(dout)));
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);

    if (lane == 0 && own_row < num_rows) {
        const int64_t at = head * p.total_q + token;
        p.delta[at] = sum - (p.dlse != nullptr ? __ldg(p.dlse + at) : 0.f);
    }
}

}  // namespace

template <typename T>
void launch_backward_preprocess(const BackwardPreprocessParams& p, cudaStream_t stream) {
    const int64_t num_rows = static_cast<int64_t>(p.total_q) * p.num_heads;
    dispatch_row_lanes(p.head_dim, [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        const int64_t ctas = (num_rows + kThreads / kLanes - 1) / (kThreads / kLanes);
        launch(
            "backward_preprocess", backward_preprocess<T, kLanes>, {dim3(static_cast<unsigned>(ctas)), kThreads, 0}, p,
            stream);
    });
}

template void launch_backward_preprocess<__half>(const BackwardPreprocessParams&, cudaStream_t);
template void launch_backward_preprocess<__nv_bfloat16>(const BackwardPreprocessParams&, cudaStream_t);

}  // namespace fsa
