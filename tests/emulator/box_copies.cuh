// Boxes of a matrix brought by the copy engine, with mbarriers: a kernel of nothing else, to check the emulator.
#pragma once

#include "device/ptx.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "device/wgmma_tile.h"

namespace box_copies {

constexpr int kBoxes = 8, kRows = 16, kColumns = 64, kThreads = 128;

// What a kernel may do wrong.
enum class Mistake {
    kNone,
    kReadTooSoon,
    kBarrierInstead,
    kOtherBoxAwaited,
    kTooFewExpected,
    kTooManyExpected,
    kTooManyArrivals,
    kNotWaitedFor,
};

struct Params {
    fsa::TensorMap map;  // of [kBoxes * kRows, kColumns]
    uint32_t* out;       // [kBoxes * kRows, kColumns / 2] words
    Mistake mistake;
};

using Box = fsa::WgmmaTile<kRows, kColumns>;
constexpr int kSharedBytes = kBoxes * Box::kBytes + kBoxes * 8;

// The first warp has the boxes brought, the others copy them to `out`.
inline __global__ void __launch_bounds__(kThreads) copy(const __grid_constant__ Params p) {
    const uint32_t memory = fsa::shared_address(fsa::dynamic_shared_memory());
    const auto tile_of = [&](int box) { return memory + box * Box::kBytes; };
    const auto barrier_of = [&](int box) { return memory + kBoxes * Box::kBytes + box * 8; };
    if (threadIdx.x == 0) {
        for (int box = 0; box < kBoxes; ++box) fsa::mbarrier_init(barrier_of(box), 1);
        fsa::fence_async_proxy();  // the copy engine arrives, too
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int box = 0; box < kBoxes; ++box) {
            int bytes = Box::kBytes;
            if (p.mistake == Mistake::kTooFewExpected && box == 3) bytes -= 16;
            if (p.mistake == Mistake::kTooManyExpected && box == 3) bytes += 16;
            fsa::mbarrier_arrive_expect(barrier_of(box), bytes);
            if (p.mistake == Mistake::kTooManyArrivals && box == 3) fsa::mbarrier_arrive(barrier_of(box));
            fsa::tma_load_3d(tile_of(box), p.map, barrier_of(box), 0, 0, box * kRows);
        }
    }
    if (p.mistake == Mistake::kBarrierInstead) __syncthreads();
    if (threadIdx.x < 32 || p.mistake == Mistake::kNotWaitedFor) return;
    const auto wait = [&] {
        for (int box = 0; box < kBoxes; ++box) fsa::mbarrier_wait(barrier_of(box), 0);
    };
    const bool waits_later = p.mistake == Mistake::kReadTooSoon || p.mistake == Mistake::kBarrierInstead;
    if (p.mistake == Mistake::kOtherBoxAwaited) {
        fsa::mbarrier_wait(barrier_of(kBoxes - 1), 0);
    } else if (!waits_later) {
        wait();
    }
    for (int i = threadIdx.x - 32; i < kBoxes * kRows * kColumns / 2; i += kThreads - 32) {
        const int row = i / (kColumns / 2), word = i % (kColumns / 2);
        p.out[i] = fsa::load_shared_4(tile_of(row / kRows) + Box::offset(row % kRows, word / 4) + word % 4 * 4);
    }
    wait();
}

}  // namespace box_copies
