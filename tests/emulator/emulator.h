// A CTA of threads as fibers, and CUDA's built-in names for them. Included before any source of csrc/ is compiled for
// the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // CTAs run one after the other
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

// What schedules are drawn from.
inline const char* schedule_seed() {
    const char* const seed = std::getenv("FSA_EMULATOR_SEED");
    return seed != nullptr ? seed : "";
}

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s (FSA_EMULATOR_SEED=%s)\n", what, schedule_seed());
    std::abort();
}

// Runs body once for every thread of every CTA of the grid.
void run_grid(dim3 ctas, int threads, int shared_bytes, const std::function<void()>& body);

struct ThreadIndex {
    unsigned x;
};

// Of the running thread.
ThreadIndex thread_index();
dim3 cta_index();
dim3 grid_size();

// Dynamic shared memory of the running CTA, and its size.
unsigned char* shared_memory();
int shared_memory_bytes();

// All 32 lanes of the running warp meet here; each brings an argument, and the last to come runs `resolve` on all of
// them. `where` tells the instruction: lanes that meet at different ones stop the run.
void meet_warp(const char* where, void* argument, void (*resolve)(void* const (&arguments)[32]));

// The same for the 128 threads of the running warpgroup: four warps, the first a multiple of four.
void meet_warpgroup(const char* where, void* argument, void (*resolve)(void* const (&arguments)[128]));

// All threads of the CTA that have not ended meet here; returns whether any brought true.
bool meet_cta(bool predicate);

// Barriers in shared memory.
void mbarrier_init(uint32_t address, int arrivals);
void mbarrier_arrive(uint32_t address, int bytes = 0);  // which the phase waits for, too
void mbarrier_complete(uint32_t address, int bytes);    // such bytes have come
void mbarrier_wait(uint32_t address, uint32_t parity);

// Copies of the copy engine: they happen once the thread has gone on, one by one in random order, and tell an mbarrier.
void defer_bulk_copy(std::function<void()> copy);

// Copies of cp.async, in the order issued; they happen when waited for.
void defer_copy(unsigned char* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending_groups);

// Writes to shared memory as the asynchronous proxy (products of wgmma) sees them: none before its writer has fenced it
// and then met the CTA at a barrier, or its warp has arrived at one. Of writes the last to each 16 bytes counts.
void note_shared_write(uint32_t address);
void fence_async_proxy();
bool visible_to_async_proxy(uint32_t address);

template <typename T, typename F>
T warp_collective(const char* where, T value, F f) {
    // f(values of all lanes, lane) -> T
    struct Argument {
        T value, result;
        F* f;
    } argument = {value, {}, &f};
    meet_warp(where, &argument, [](void* const(&arguments)[32]) {
        T values[32];
        for (int lane = 0; lane < 32; ++lane) values[lane] = static_cast<Argument*>(arguments[lane])->value;
        for (int lane = 0; lane < 32; ++lane) {
            Argument& a = *static_cast<Argument*>(arguments[lane]);
            a.result = (*a.f)(values, lane);
        }
    });
    return argument.result;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::cta_index())
#define gridDim (::emulator::grid_size())

using std::max;
using std::min;

inline void require_full_mask(unsigned mask) {
    if (mask != ~0u) emulator::fail("a warp collective without all lanes");
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    require_full_mask(mask);
    // Each lane brings its own source: the value travels with it.
    struct Pair {
        T value;
        int source;
    };
    const Pair result =
        emulator::warp_collective("shfl", Pair{value, source}, [width](const Pair(&pairs)[32], int lane) {
            return Pair{pairs[lane / width * width + pairs[lane].source % width].value, 0};
        });
    return result.value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    require_full_mask(mask);
    return emulator::warp_collective(
        "shfl.xor", value, [lane_mask](const T(&values)[32], int lane) { return values[lane ^ lane_mask]; });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
    require_full_mask(mask);
    return emulator::warp_collective("shfl.up", value, [delta](const T(&values)[32], int lane) {
        return values[lane >= delta ? lane - delta : lane];
    });
}

inline int __any_sync(unsigned mask, int predicate) {
    require_full_mask(mask);
    return emulator::warp_collective("any", predicate, [](const int (&values)[32], int) {
        return static_cast<int>(std::any_of(values, values + 32, [](int x) { return x != 0; }));
    });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    require_full_mask(mask);
    return emulator::warp_collective(
        "ballot", static_cast<unsigned>(predicate != 0), [](const unsigned (&values)[32], int) {
            unsigned votes = 0;
            for (int lane = 0; lane < 32; ++lane) votes |= values[lane] << lane;
            return votes;
        });
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    require_full_mask(mask);
    return emulator::warp_collective(
        "redux.max", value, [](const unsigned (&values)[32], int) { return *std::max_element(values, values + 32); });
}

inline void __syncwarp() {
    emulator::warp_collective("syncwarp", 0, [](const int (&)[32], int) { return 0; });
}

inline void __syncthreads() {
    emulator::meet_cta(false);
}

inline int __syncthreads_or(int predicate) {
    return emulator::meet_cta(predicate != 0);
}

template <typename T>
T __ldg(const T* p) {
    return *p;
}

template <typename T>
T __ldcs(const T* p) {
    return *p;
}

template <typename T>
T atomicAdd(T* p, T x) {
    const T before = *p;
    *p = before + x;
    return before;
}

inline unsigned atomicOr(unsigned* p, unsigned x) {
    const unsigned before = *p;
    *p = before | x;
    return before;
}
inline unsigned atomicAnd(unsigned* p, unsigned x) {
    const unsigned before = *p;
    *p = before & x;
    return before;
}
inline int __ffs(unsigned x) {
    return x == 0 ? 0 : std::countr_zero(x) + 1;
}
inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}
inline int __popc(unsigned x) {
    return std::popcount(x);
}

inline unsigned __vmaxu2(unsigned a, unsigned b) {
    return std::max(a & 0xffffu, b & 0xffffu) | std::max(a & 0xffff0000u, b & 0xffff0000u);
}

inline float __int_as_float(int x) {
    return std::bit_cast<float>(x);
}

inline int __float_as_int(float x) {
    return std::bit_cast<int>(x);
}

inline float __uint_as_float(unsigned x) {
    return std::bit_cast<float>(x);
}

inline float __log2f(float x) {
    return std::log2(x);
}

using std::isfinite;
