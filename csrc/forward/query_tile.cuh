// What the forward main kernels do with a warp's tile of query rows, on registers: fetch, mask, softmax, store. Rows lie as
// in the accumulators of mma.m16n8k16 (device/ptx.cuh); wgmma gives each of its warps the same.
#pragma once

#include <type_traits>

#include "device/convert.cuh"
#include "device/load_tile.cuh"
#include "device/ptx.cuh"
#include "device/softmax.cuh"
#include "device/work_item.cuh"

namespace fsa {
namespace forward_main {

// What a CTA knows of its current work item. It lies in shared memory: the inner loop has better uses for registers.
template <typename Traits>
struct ItemState {
    WorkItemQueue queue;
    int64_t first_partial_row;  // first_partial_row(item.head)
    uint32_t warp_max[Traits::kWarps];
    float output_scale;    // 2^-value_exponent
    int nonfinite_values;  // V holds inf or NaN
};

// Row i of a lane (i = 0 .. 2 * kMmaRows - 1) is row 8 * i + lane / 4 of the warp's tile.
template <typename Traits>
constexpr int kLaneRows = 2 * Traits::kMmaRows;

// Chunk 4j + lane % 4 of each of the lane's rows: words 0, 1 are the A fragment of step 2j, words 2, 3 that of step
// 2j + 1.
template <typename Traits>
using QueryFragments = uint4[kLaneRows<Traits>][Traits::kHeadDim / 32];

template <typename Traits>
using Scores = float[Traits::kMmaRows][Traits::kTileK / 8][4];

// P as A fragments: [m16 tile][n8 tile of the scores][row half]
template <typename Traits>
using Probs = uint32_t[Traits::kMmaRows][Traits::kTileK / 8][2];

template <typename Traits>
__device__ __forceinline__ void load_queries(
    QueryFragments<Traits>& q, const ForwardMainParams& p, const WorkItem& item, const QueryRow& row) {
    using T = typename Traits::T;
    const int lane = threadIdx.x % 32, num_chunks = p.geometry.head_dim / 8;
    const T* own = row_pointer<T>(p.q, row.query, item.kv_head * p.geometry.group_size + row.group_head);
#pragma unroll
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const unsigned long long address =
            __shfl_sync(~0u, reinterpret_cast<unsigned long long>(own), 8 * i + lane / 4);
        const uint4* chunks = reinterpret_cast<const uint4*>(address) + lane % 4;
#pragma unroll
        for (int j = 0; j < Traits::kHeadDim / 32; ++j) {
            q[i][j] = 4 * j + lane % 4 < num_chunks ? __ldg(chunks + 4 * j) : make_uint4(0, 0, 0, 0);
        }
    }
}

// Keys that a row does not see get -inf: causality and the end of the sequence at once.
template <typename Traits>
__device__ __forceinline__ void mask_invisible(Scores<Traits>& s, const QueryRow& row) {
    const int lane = threadIdx.x % 32;
    if (!__any_sync(~0u, row.last_visible < Traits::kTileK - 1)) return;
#pragma unroll
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const int last = __shfl_sync(~0u, row.last_visible, 8 * i + lane / 4);
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n)
#pragma unroll
            for (int x = 0; x < 2; ++x)
                if (n * 8 + lane % 4 * 2 + x > last) s[i / 2][n][i % 2 * 2 + x] = -INFINITY;
    }
}

// P = softmax(S) * output_scale, and the row's log-sum-exp to memory, by store(address, value). P is normalised here rather
// than O, which is wider. The rows go through each step together: what one waits for, the others hide.
template <typename Traits, typename Store>
__device__ __forceinline__ void normalise_and_store_lse(
    Probs<Traits>& probs, Scores<Traits>& s, const ForwardMainParams& p, const ItemState<Traits>& state,
    const QueryRow& row, const Store& store) {
    constexpr int kRows = kLaneRows<Traits>;
    const int lane = threadIdx.x % 32;
    float* lse_partial = p.lse_partial + state.first_partial_row;
    float shift[kRows], row_sum[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        shift[i] = s[i / 2][0][i % 2 * 2];
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n)
            shift[i] = fmaxf(shift[i], fmaxf(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) shift[i] = finite_shift(quad_max(shift[i])) * p.softmax_scale_log2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 4; ++n) {
            float& x = s[i / 2][n / 2][i % 2 * 2 + n % 2];
            x = exp2_approx(fmaf(x, p.softmax_scale_log2, -shift[i]));
            sums[n % 2] += x;
        }
        row_sum[i] = sums[0] + sums[1];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        row_sum[i] = quad_sum(row_sum[i]);
        const float scale = reciprocal_or_zero(row_sum[i]) * state.output_scale;
#pragma unroll
        for (int n = 0; n < Traits::kTileK / 8; ++n) {
            const float* const x = &s[i / 2][n][i % 2 * 2];
            probs[i / 2][n][i % 2] = HalfType<typename Traits::T>::pack(x[0] * scale, x[1] * scale);
        }
    }
    // Lane i stores that of row i, so that rows which lie side by side leave together.
    float lse = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const float of_row = __shfl_sync(~0u, log2_sum_exp(shift[i], row_sum[i]), lane % 8 * 4);
        if (lane / 8 % kRows == i) lse = of_row;
    }
    if (lane < Traits::kMmaRows * 16 && row.partial_row >= 0) store(lse_partial + row.partial_row, lse);
}

// 32 columns of O, from the accumulators of four neighbouring n8 tiles: since V is interleaved, a lane has 8 columns of
// each of its rows.
template <typename Traits>
__device__ __forceinline__ void store_partial(
    __half* o_partial, const int (&partial_row)[kLaneRows<Traits>], const float (&o)[Traits::kMmaRows][4][4],
    int first_column, int head_dim) {
    using Partial = HalfType<__half>;
    const int column = first_column + 8 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const auto& tiles = o[i / 2];
        const int x = i % 2 * 2;
        if (partial_row[i] >= 0 && column < head_dim) {
            *reinterpret_cast<uint4*>(o_partial + static_cast<int64_t>(partial_row[i]) * head_dim + column) =
                make_uint4(
                    Partial::pack(tiles[0][x], tiles[0][x + 1]), Partial::pack(tiles[1][x], tiles[1][x + 1]),
                    Partial::pack(tiles[2][x], tiles[2][x + 1]), Partial::pack(tiles[3][x], tiles[3][x + 1]));
        }
    }
}

// The power of two by which partials are divided, so that |V| < 2^15 and fp16 holds every convex combination of values.
// fp16 values keep theirs unless they reach 2^15: raising small ones would cost P its range.
template <typename T>
__device__ __forceinline__ int value_exponent(uint32_t packed_max) {
    const float2 m = HalfType<T>::unpack(packed_max);
    const float largest = fmaxf(m.x, m.y);
    if (largest == 0.f) return 0;
    const int exponent = ilogbf(largest) - 14;
    return std::is_same_v<T, __half> ? max(exponent, 0) : min(max(exponent, -100), 120);
}

// Fills the state but for the item: from what each thread saw of the values of the sub-block. All threads of the CTA take
// part.
template <typename Traits>
__device__ __forceinline__ void publish_value_scale(
    ItemState<Traits>& state, const TileMagnitude& values, const ForwardMainParams& p) {
    const uint32_t low = __reduce_max_sync(~0u, values.packed_max & 0xffffu),
                   high = __reduce_max_sync(~0u, values.packed_max >> 16);
    if (threadIdx.x % 32 == 0) state.warp_max[threadIdx.x / 32] = max(low, high);
    const int nonfinite = __syncthreads_or(values.nonfinite);
    if (threadIdx.x == 0) {
        uint32_t largest = 0;
        for (const uint32_t x : state.warp_max) largest = max(largest, x);
        const int exponent = value_exponent<typename Traits::T>(largest);
        const WorkItem& item = state.queue.item;
        state.first_partial_row = first_partial_row(p.geometry, item.head);
        p.value_exponent[static_cast<int64_t>(item.cell) * p.geometry.subs + item.sub] = exponent;
        state.output_scale = __int_as_float((127 - exponent) << 23);
        state.nonfinite_values = nonfinite;
    }
    __syncthreads();
}

// Adds to the warp's rows of O what the inf and NaN of num_keys values contribute. chunk_of(r, partial row, column): where 8
// columns of row r (0 .. 16 * kMmaRows - 1) lie.
template <typename Traits, typename ChunkOf>
__device__ __forceinline__ void restore_nonfinite_values(
    const typename Traits::T* values, int64_t value_stride, int num_keys, int head_dim, const QueryRow& row,
    const ChunkOf& chunk_of) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < kLaneRows<Traits>; ++i) {
        const int tile_row = 8 * i + lane / 4;
        const int partial_row = __shfl_sync(~0u, row.partial_row, tile_row);
        const int last = min(__shfl_sync(~0u, row.last_visible, tile_row), num_keys - 1);
#pragma unroll 1
        for (int column = 8 * (lane % 4); partial_row >= 0 && column < head_dim; column += 32) {
            add_nonfinite_keys(values + column, value_stride, last, chunk_of(tile_row, partial_row, column));
        }
        __syncwarp();
    }
}

}  // namespace forward_main
}  // namespace fsa
