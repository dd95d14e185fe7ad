#include "selection/select_topk.h"

#include <climits>

#include "device/ptx.cuh"
#include "device/sequence.cuh"
#include "launch.h"

namespace fsa {
namespace {

constexpr int kWarps = 8;
constexpr int kLanes = 32;

// What is left of a row when few blocks are: a lane has one each, in ascending order of ids.
struct Candidates {
    int key[kLanes], block[kLanes];
};

// The blocks of a row among which scores decide, those in [begin, end), and how many of them are taken: fewer than all.
struct Row {
    const float* scores;
    int begin, end, wanted;

    // Scores are not negative, so their bits are ordered as they are; NaN counts as 0.
    static __device__ __forceinline__ int key(float score) {
        return __float_as_int(fmaxf(score, 0.f));
    }

    // Calls f(block, key) with the blocks in ascending order, one a lane; the key is -1 behind the end.
    template <typename F>
    __device__ __forceinline__ void for_each(const F& f) const {
        constexpr int kAtOnce = 8;
        int block = begin + static_cast<int>(threadIdx.x) % kLanes, left = end - begin;
        const float* own = scores + block;
#pragma unroll 1
        for (; left >= kAtOnce * kLanes; left -= kAtOnce * kLanes) {
            float score[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) score[i] = __ldg(own + i * kLanes);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) f(block + i * kLanes, key(score[i]));
            block += kAtOnce * kLanes;
            own += kAtOnce * kLanes;
        }
#pragma unroll 1
        for (; left > 0; left -= kLanes) {
            f(block, block < end ? key(__ldg(own)) : -1);
            block += kLanes;
            own += kLanes;
        }
    }

    __device__ __forceinline__ int num_reaching(int low) const {
        int count = 0;
        for_each([&](int, int key) { count += __popc(__ballot_sync(~0u, key >= low)); });
        return count;
    }
};

__device__ __forceinline__ unsigned lower_lanes() {
    return (1u << threadIdx.x % kLanes) - 1;
}

// A key, not far below the best such, that at least `wanted` blocks reach: where so many lanes have one, their maxima tell.
__device__ __forceinline__ int lower_bound(const Row& row) {
    if (row.wanted > kLanes) return 0;
    int maximum = -1, bound = 0;
    row.for_each([&](int, int key) { maximum = max(maximum, key); });
#pragma unroll
    for (int bit = 30; bit >= 16; --bit) {
        const int higher = bound | 1 << bit;
        if (__popc(__ballot_sync(~0u, maximum >= higher)) >= row.wanted) bound = higher;
    }
    return bound;
}

// Puts the blocks that reach `low` into `candidates` as long as there is room; returns how many they are.
__device__ __forceinline__ int collect(Candidates& candidates, const Row& row, int low) {
    int count = 0;
    __syncwarp();
    row.for_each([&](int block, int key) {
        const unsigned reaching = __ballot_sync(~0u, key >= low);
        if (reaching == 0) return;
        const int at = count + __popc(reaching & lower_lanes());
        if (key >= low && at < kLanes) {
            candidates.key[at] = key;
            candidates.block[at] = block;
        }
        count += __popc(reaching);
    });
    __syncwarp();
    return count;
}

// The best `wanted` of at most 32 candidates; of equal ones those that come first.
__device__ __forceinline__ void take_best(int32_t* selected, const Candidates& candidates, int count, int wanted) {
    const int lane = threadIdx.x % kLanes;
    const int key = lane < count ? candidates.key[lane] : -1;
    int better = 0;
    for (int i = 0; i < count; ++i) {
        const int other = __shfl_sync(~0u, key, i);
        better += other > key || (other == key && i < lane);
    }
    const bool taken = lane < count && better < wanted;
    const unsigned all_taken = __ballot_sync(~0u, taken);
    if (taken) selected[__popc(all_taken & lower_lanes())] = candidates.block[lane];
}

// The blocks above `threshold`, and of those that equal it as many as are still wanted, those that come first.
__device__ __forceinline__ void take_reaching(int32_t* selected, const Row& row, int threshold) {
    int equal_left = row.wanted - row.num_reaching(threshold + 1), count = 0;
    row.for_each([&](int block, int key) {
        const unsigned equal = __ballot_sync(~0u, key == threshold);
        const bool taken = key > threshold || (key == threshold && __popc(equal & lower_lanes()) < equal_left);
        const unsigned all_taken = __ballot_sync(~0u, taken);
        if (taken) selected[count + __popc(all_taken & lower_lanes())] = block;
        count += __popc(all_taken);
        equal_left -= min(equal_left, __popc(equal));
    });
}

// The row's blocks with the highest scores, in ascending order.
__device__ __forceinline__ void take_highest(int32_t* selected, Candidates& candidates, const Row& row) {
    int low = lower_bound(row), high = INT_MAX;  // at least `wanted` blocks reach low, fewer reach high
    int count = collect(candidates, row, low);
    if (count > kLanes) {
        // Many equal scores, or many slots: bisection until few blocks are left, or just those that are wanted.
        while (count > kLanes && count != row.wanted && high - low > 1) {
            const int middle = low + (high - low) / 2, reaching = row.num_reaching(middle);
            if (reaching >= row.wanted) {
                low = middle;
                count = reaching;
            } else {
                high = middle;
            }
        }
        if (count > kLanes) return take_reaching(selected, row, low);
        count = collect(candidates, row, low);
    }
    take_best(selected, candidates, count, row.wanted);
}

// A warp a (query token, KV head).
__global__ void __launch_bounds__(kWarps * 32) select_topk(SelectTopkParams p) {
    await_kernel_before();
    Candidates& candidates = static_cast<Candidates*>(dynamic_shared_memory())[threadIdx.x / kLanes];
    const int lane = threadIdx.x % kLanes;
    const int64_t row_index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
    const int query = p.query_begin + static_cast<int>(row_index / p.num_kv_heads);
    const int kv_head = static_cast<int>(row_index % p.num_kv_heads);
    if (query >= p.query_end) return;
    const SequenceBounds bounds = sequence_bounds(p.sequences, sequence_of_query(p.sequences, query));
    const int position = query - bounds.query_begin;
    const int num_visible = position >= 0 && position < bounds.num_queries ? position / p.block_size + 1 : 0;

    // Forced blocks, or all there are
    int32_t* selected = p.topk_idx + (static_cast<int64_t>(kv_head) * p.sequences.total_q + query) * p.topk;
    const bool all = num_visible <= p.topk;
    for (int slot = lane; slot < p.topk; slot += kLanes) {
        if (all) {
            selected[slot] = slot < num_visible ? slot : -1;
        } else if (slot < p.init_blocks) {
            selected[slot] = slot;
        } else if (slot >= p.topk - p.local_blocks) {
            selected[slot] = num_visible - p.topk + slot;
        }
    }
    const int wanted = p.topk - p.init_blocks - p.local_blocks;
    if (all || wanted == 0) return;
    const Row row = {p.scores + row_index * p.scores_stride, p.init_blocks, num_visible - p.local_blocks, wanted};
    take_highest(selected + p.init_blocks, candidates, row);
}

}  // namespace

void launch_select_topk(const SelectTopkParams& p, cudaStream_t stream) {
    const int64_t num_rows = static_cast<int64_t>(p.query_end - p.query_begin) * p.num_kv_heads;
    const dim3 ctas(static_cast<unsigned>((num_rows + kWarps - 1) / kWarps));
    launch(
        "select_topk", select_topk, {ctas, kWarps * kLanes, kWarps * static_cast<int>(sizeof(Candidates))}, p, stream);
}

}  // namespace fsa
