// The buffers of a CTA of the forward shared kernel, and the barriers by which loaders and those who multiply hand them over.
#pragma once

#include <climits>

#include "device/ptx.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

struct Sm90Params : ForwardSharedParams {
    TensorMap k_map, v_map;
    // Of o_partial: boxes of 2^log2_partial_rows heads of one query, of such of a few queries, and of all queries of a unit.
    TensorMap partial_map, few_partial_map, unit_partial_map;
    int log2_partial_rows, log2_few_queries, log2_unit_queries;
};

constexpr int kPartialsALoad = 2;  // one where K would be, one where V would be

// What passes through a buffer of K and one of V at a time: these of some sub-blocks, or two partials of every row.
template <typename Traits>
struct Load {
    int unit;           // -1 behind the last
    int first_partial;  // the first one, of the row's scattered slots and their sub-blocks; -1: K and V
    int kv_head;        // of the tensors
    SharedSubBlock blocks[Traits::kSubBlocks];
};

// What partials count for.
constexpr int kNoPartial = INT_MIN;
template <typename Traits>
struct alignas(8) PartialScales {
    float lse[Traits::kRows];  // log2
    // Values are times 2^-exponent; kNoPartial: there is none. Rows that come together have it where their first one is.
    int exponent[Traits::kRows];
};

// Load n has buffer n % kBuffers, once for K and once for V; the u-th unit of a CTA has the queries' buffer
// u % kQueryBuffers. Phase n / kBuffers (u / kQueryBuffers) of a buffer's barriers is theirs. The values of a load are
// needed, and gone, later than its keys. A load of partials has one where K would be, and one where V would be: they come, and
// are done with, one by one.
template <typename Traits>
struct Pipeline {
    static constexpr int kDescriptions = 2 * Traits::kBuffers;

    struct State {
        uint64_t described[kDescriptions];         // the load's description is there, for the checkers
        uint64_t keys_landed[Traits::kBuffers];    // the load's description is there, and K
        uint64_t keys_full[Traits::kBuffers];      // the partial where K would be is there; K needs no such look
        uint64_t keys_empty[Traits::kBuffers];     // all warps that multiply are done
        uint64_t values_landed[Traits::kBuffers];  // V; or its buffer is free
        uint64_t values_full[Traits::kBuffers];    // V has been looked at; or the partial where it would be is there
        uint64_t values_empty[Traits::kBuffers];
        uint64_t queries_wanted[Traits::kQueryBuffers];
        uint64_t queries_full[Traits::kQueryBuffers];
        uint64_t queries_empty[Traits::kQueryBuffers];
        uint64_t turns[2];  // whose phase t ends when it is a warpgroup's turn to begin products for the t-th time
        int units[Traits::kQueryBuffers];  // whose queries are wanted; -1 behind the last
        // V held inf or NaN, as each of those who look saw it.
        bool nonfinite_values[Traits::kBuffers][Traits::kCheckers];
        // Load n has n % kDescriptions of each. A load is written for a later one once V of load n + kBuffers - 2 is empty.
        Load<Traits> loads[kDescriptions];
        PartialScales<Traits> scales[kDescriptions][kPartialsALoad];
    };
    static_assert(sizeof(State) <= Traits::kStateBytes);

    State& state;
    uint32_t memory;  // shared-memory address of the buffers

    // Of load n, of unit u. Unsigned: a power of two then takes an instruction.
    static __device__ __forceinline__ unsigned buffer(int n) {
        return static_cast<unsigned>(n) % Traits::kBuffers;
    }
    static __device__ __forceinline__ unsigned parity(int n) {
        return static_cast<unsigned>(n) / Traits::kBuffers % 2;
    }
    static __device__ __forceinline__ unsigned query_buffer(int u) {
        return static_cast<unsigned>(u) % Traits::kQueryBuffers;
    }
    static __device__ __forceinline__ unsigned query_parity(int u) {
        return static_cast<unsigned>(u) / Traits::kQueryBuffers % 2;
    }
    __device__ __forceinline__ Load<Traits>& load(int n) const {
        return state.loads[static_cast<unsigned>(n) % kDescriptions];
    }
    __device__ __forceinline__ uint32_t k_tile(int n) const {
        return memory + buffer(n) * Traits::Tile::kBytes;
    }
    __device__ __forceinline__ uint32_t v_tile(int n) const {
        return k_tile(n) + Traits::kValuesOffset;
    }
    // The i-th partials of load n, a row of the unit each.
    __device__ __forceinline__ uint32_t partial_tile(int n, int i) const {
        return i == 0 ? k_tile(n) : v_tile(n);
    }
    __device__ __forceinline__ PartialScales<Traits>& partial_scales(int n, int i) const {
        return state.scales[static_cast<unsigned>(n) % kDescriptions][i];
    }
    // Offset of a warp's queries of unit u.
    __device__ __forceinline__ uint32_t stage_offset(int u, int warp) const {
        return Traits::kQueriesOffset + query_buffer(u) * Traits::kQueryBytes + warp * Traits::Stage::kBytes;
    }

    // One thread; a barrier of the CTA follows. Who has read or written data arrives for itself, thread by thread: racecheck
    // does not see what a lane that arrives for its warp knows of the others.
    __device__ __forceinline__ void init() const {
        constexpr int kConsumers = 32 * Traits::kWarps;
        for (uint64_t& barrier : state.described) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.keys_landed) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.keys_full) mbarrier_init(shared_address(&barrier), 32);
        for (uint64_t& barrier : state.keys_empty) mbarrier_init(shared_address(&barrier), kConsumers);
        for (uint64_t& barrier : state.values_landed) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.values_full) mbarrier_init(shared_address(&barrier), 32 * Traits::kCheckers);
        for (uint64_t& barrier : state.values_empty) mbarrier_init(shared_address(&barrier), kConsumers);
        for (uint64_t& barrier : state.queries_wanted) mbarrier_init(shared_address(&barrier), 1);
        for (uint64_t& barrier : state.queries_full) mbarrier_init(shared_address(&barrier), 32);
        for (uint64_t& barrier : state.queries_empty) mbarrier_init(shared_address(&barrier), kConsumers);
        for (uint64_t& barrier : state.turns) mbarrier_init(shared_address(&barrier), 4);  // warps of the other one
        fence_async_proxy();  // the copy engine arrives, too
    }
    // The barriers of load n.
    __device__ __forceinline__ uint32_t own_barrier(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        return shared_address(&barriers[buffer(n)]);
    }
    __device__ __forceinline__ void wait(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        mbarrier_wait(own_barrier(barriers, n), parity(n));
    }
    __device__ __forceinline__ void arrive(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        mbarrier_arrive(own_barrier(barriers, n));
    }
    // One thread, which has written load n; and who waits for that.
    __device__ __forceinline__ void arrive_described(int n) const {
        mbarrier_arrive(shared_address(&state.described[static_cast<unsigned>(n) % kDescriptions]));
    }
    __device__ __forceinline__ void wait_described(int n) const {
        const unsigned index = static_cast<unsigned>(n) % kDescriptions;
        mbarrier_wait(shared_address(&state.described[index]), static_cast<unsigned>(n) / kDescriptions % 2);
    }
    // Until the load that had the buffer before load n is done with it; free at the beginning.
    __device__ __forceinline__ void wait_empty(uint64_t (&barriers)[Traits::kBuffers], int n) const {
        if (n >= Traits::kBuffers) wait(barriers, n - Traits::kBuffers);
    }
    // Once values_full says so.
    __device__ __forceinline__ bool has_nonfinite_values(int n) const {
        bool any = false;
        for (const bool seen : state.nonfinite_values[buffer(n)]) any |= seen;
        return any;
    }

    // A warp asks for the queries of a unit, or says with -1 that there are no more.
    __device__ __forceinline__ void want_queries(int u, int unit) const {
        if (u >= Traits::kQueryBuffers) wait_queries(u - Traits::kQueryBuffers);  // `units` has been read
        if (threadIdx.x % 32 > 0) return;
        state.units[query_buffer(u)] = unit;
        mbarrier_arrive(shared_address(&state.queries_wanted[query_buffer(u)]));
    }
    __device__ __forceinline__ int wanted_queries(int u) const {
        mbarrier_wait(shared_address(&state.queries_wanted[query_buffer(u)]), query_parity(u));
        return state.units[query_buffer(u)];
    }
    __device__ __forceinline__ void arrive_queries(int u) const {
        mbarrier_arrive(shared_address(&state.queries_full[query_buffer(u)]));
    }
    __device__ __forceinline__ void wait_queries(int u) const {
        mbarrier_wait(shared_address(&state.queries_full[query_buffer(u)]), query_parity(u));
    }
    __device__ __forceinline__ void arrive_queries_empty(int u) const {
        mbarrier_arrive(shared_address(&state.queries_empty[query_buffer(u)]));
    }
    __device__ __forceinline__ void wait_queries_empty(int u) const {
        if (u < Traits::kQueryBuffers) return;
        mbarrier_wait(shared_address(&state.queries_empty[query_buffer(u)]), query_parity(u - Traits::kQueryBuffers));
    }

    // Two warpgroups begin their products in turn, load by load: left alone they fall into step, and the tensor cores rest
    // while both have their softmax. No data depends on it. The second one passes once before its first load.
    __device__ __forceinline__ void await_turn(int warpgroup, int t) const {
        if (Traits::kWarpgroups == 2) mbarrier_wait(shared_address(&state.turns[warpgroup]), t & 1);
    }
    __device__ __forceinline__ void pass_turn(int warpgroup) const {
        if (Traits::kWarpgroups == 2 && threadIdx.x % 32 == 0)
            mbarrier_arrive(shared_address(&state.turns[1 - warpgroup]));
    }
};

}  // namespace forward_shared
}  // namespace fsa
