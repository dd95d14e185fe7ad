// Boxes of a matrix brought by the copy engine, with mbarriers: a kernel of nothing else, to check the emulator.
#pragma once

#include "device/ptx.cuh"
#include "device/tma.cuh"
#include "device/wgmma_tile.h"

namespace box_copies {

constexpr int kBoxes = 8, kRows = 16, kColumns = 64, kThreads = 128;

// What a kernel may do wrong.
enum class Mistake {
    kNone,
    kReadTooSoon,
    kTooFewExpected,
    kTooManyArrivals,
    kNoWait,
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
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int box = 0; box < kBoxes; ++box) {
            const bool too_few = p.mistake == Mistake::kTooFewExpected && box == 3;
            fsa::mbarrier_arrive_expect(barrier_of(box), too_few ? Box::kBytes - 16 : Box::kBytes);
            if (p.mistake == Mistake::kTooManyArrivals && box == 3) fsa::mbarrier_arrive(barrier_of(box));
            fsa::tma_load_3d(tile_of(box), p.map, barrier_of(box), 0, 0, box * kRows);
        }
    }
    if (threadIdx.x < 32 || p.mistake == Mistake::kNoWait) return;
    for (int box = 0; box < kBoxes; ++box) {
        if (p.mistake != Mistake::kReadTooSoon) fsa::mbarrier_wait(barrier_of(box), 0);
        for (int i = threadIdx.x - 32; i < kRows * kColumns / 2; i += kThreads - 32) {
            const int row = i / (kColumns / 2), word = i % (kColumns / 2);
            p.out[box * kRows * kColumns / 2 + i] =
                fsa::load_shared_4(tile_of(box) + Box::offset(row, word / 4) + word % 4 * 4);
        }
    }
    if (p.mistake == Mistake::kReadTooSoon) {
        for (int box = 0; box < kBoxes; ++box) fsa::mbarrier_wait(barrier_of(box), 0);
    }
}

}  // namespace box_copies
