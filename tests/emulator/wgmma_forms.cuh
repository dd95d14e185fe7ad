// D = A B + C by every form of product that device/wgmma.cuh has: a kernel of nothing else, to check the emulator.
#pragma once

#include "device/convert.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "device/wgmma_tile.h"

namespace wgmma_forms {

constexpr int kWarpgroups = 2, kRows = 64 * kWarpgroups;

// What a kernel may do wrong.
enum class Mistake {
    kNone,
    kNoProxyFence,
    kNoBarrier,
    kNoRegisterFence,
    kResultsTooSoon,
    kNoWait,
    kOperandOverwritten,
    kAccumulatorsOverwritten,
    kWarpMissing,
    kDescriptorsDiffer,
    kOutOfBounds,
};

struct Params {
    const float *a, *b, *c;  // [kRows][sum], [sum][columns], [kRows][columns]
    float* d;
    Mistake mistake;
};

enum class OperandA { kRegisters, kSum, kOuter };

template <typename T_, OperandA kA_, fsa::Major kB_, int kColumns_, int kSum_>
struct Form {
    using T = T_;
    static constexpr OperandA kA = kA_;
    static constexpr fsa::Major kB = kB_;
    static constexpr int kColumns = kColumns_, kSum = kSum_;
    static constexpr bool kAOuter = kA == OperandA::kOuter, kBOuter = kB == fsa::Major::kOuter;

    // Panels are as wide as where the sum runs along the columns; of the narrow ones the last is not used.
    static constexpr int kOuterColumns = kSum % 64 == 0 ? kRows : kRows + 32;
    using TileA = fsa::WgmmaTile<kAOuter ? kSum : kRows, kAOuter ? kOuterColumns : kSum>;
    using TileB = fsa::WgmmaTile<kBOuter ? kSum : kColumns, kBOuter ? kColumns : kSum>;
    static constexpr int kSharedBytes = TileA::kBytes + TileB::kBytes;
};

// Element (row, column) is element(row, column) of the matrix.
template <typename T, typename Tile, typename Element>
__device__ void fill_tile(uint32_t tile, int rows, int columns, const Element& element) {
    for (int i = threadIdx.x; i < rows * columns / 2; i += kWarpgroups * 128) {
        const int row = i / (columns / 2), column = i % (columns / 2) * 2;
        fsa::store_shared_4(
            tile + Tile::offset(row, column / 8) + column % 8 * 2,
            fsa::HalfType<T>::pack(element(row, column), element(row, column + 1)));
    }
}

template <typename Form>
__global__ void __launch_bounds__(kWarpgroups * 128) multiply(const __grid_constant__ Params p) {
    using T = typename Form::T;
    using TileA = typename Form::TileA;
    using TileB = typename Form::TileB;
    constexpr int kSum = Form::kSum, kColumns = Form::kColumns;
    const uint32_t a_tile = fsa::shared_address(fsa::dynamic_shared_memory()), b_tile = a_tile + TileA::kBytes;
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 * 16 + lane / 4, lane_column = lane % 4 * 2;

    auto element_of_a = [&](int row, int k) { return p.a[row * kSum + k]; };
    auto element_of_b = [&](int k, int column) { return p.b[k * kColumns + column]; };
    if constexpr (Form::kA == OperandA::kSum) fill_tile<T, TileA>(a_tile, kRows, kSum, element_of_a);
    if constexpr (Form::kA == OperandA::kOuter)
        fill_tile<T, TileA>(a_tile, kSum, kRows, [&](int k, int row) { return element_of_a(row, k); });
    if constexpr (Form::kBOuter) {
        fill_tile<T, TileB>(b_tile, kSum, kColumns, element_of_b);
    } else {
        fill_tile<T, TileB>(b_tile, kColumns, kSum, [&](int column, int k) { return element_of_b(k, column); });
    }
    if (p.mistake != Mistake::kNoProxyFence) fsa::fence_async_proxy();
    if (p.mistake != Mistake::kNoBarrier) __syncthreads();

    auto column_of = [&](int i) { return i / 4 * 8 + lane_column + i % 2; };
    auto row_of = [&](int i) { return row + i / 2 % 2 * 8; };
    float d[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) d[i] = p.c[row_of(i) * kColumns + column_of(i)];
    uint32_t a[kSum / 16][4];
#pragma unroll
    for (int i = 0; i < kSum / 4; ++i) {
        const int k = i / 4 * 16 + i / 2 % 2 * 8 + lane_column, of_row = row + i % 2 * 8;
        a[i / 4][i % 4] = fsa::HalfType<T>::pack(element_of_a(of_row, k), element_of_a(of_row, k + 1));
    }

    if (p.mistake == Mistake::kWarpMissing && threadIdx.x / 32 == 5) return;
    if (p.mistake != Mistake::kNoRegisterFence) fsa::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSum / 16; ++step) {
        uint64_t b = Form::kBOuter ? TileB::along_rows(b_tile, step) : TileB::along_columns(b_tile, step);
        if (p.mistake == Mistake::kOutOfBounds) b += (TileB::kBytes - 1024) >> 4;
        if (p.mistake == Mistake::kDescriptorsDiffer && threadIdx.x == 17) b += 2;
        if constexpr (Form::kA == OperandA::kRegisters) {
            fsa::wgmma_rs<T, Form::kB>(d, a[step], b, true);
        } else if constexpr (Form::kA == OperandA::kSum) {
            fsa::wgmma_ss<T, fsa::Major::kSum, Form::kB>(
                d, TileA::along_columns(a_tile, step, 64 * warpgroup), b, true);
        } else {
            fsa::wgmma_ss<T, fsa::Major::kOuter, Form::kB>(
                d, TileA::along_rows(a_tile, step, warpgroup * (64 / TileA::kPanelColumns)), b, true);
        }
    }
    fsa::wgmma_commit();
    if (p.mistake == Mistake::kNoWait) return;
    if (p.mistake == Mistake::kOperandOverwritten) fsa::store_shared_4(b_tile + 4 * threadIdx.x, 0);
    if (p.mistake == Mistake::kAccumulatorsOverwritten) d[0] = 0.f;
    if (p.mistake != Mistake::kResultsTooSoon) fsa::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) p.d[row_of(i) * kColumns + column_of(i)] = d[i];
    if (p.mistake == Mistake::kResultsTooSoon) fsa::wgmma_wait<0>();
}

// Calls f(Form()) for every form.
template <typename F>
void for_each_form(const F& f) {
    auto with_sum = [&]<typename T, OperandA kA, fsa::Major kB, int kColumns>() {
        f(Form<T, kA, kB, kColumns, 128>());
        f(Form<T, kA, kB, kColumns, 96>());
    };
    auto with_columns = [&]<typename T, OperandA kA, fsa::Major kB>() {
        with_sum.template operator()<T, kA, kB, 32>();
        with_sum.template operator()<T, kA, kB, 64>();
        with_sum.template operator()<T, kA, kB, 96>();
        with_sum.template operator()<T, kA, kB, 128>();
    };
    auto with_b = [&]<typename T, OperandA kA>() {
        with_columns.template operator()<T, kA, fsa::Major::kSum>();
        with_columns.template operator()<T, kA, fsa::Major::kOuter>();
    };
    auto with_a = [&]<typename T>() {
        with_b.template operator()<T, OperandA::kRegisters>();
        with_b.template operator()<T, OperandA::kSum>();
        with_b.template operator()<T, OperandA::kOuter>();
    };
    with_a.template operator()<__half>();
    with_a.template operator()<__nv_bfloat16>();
}

}  // namespace wgmma_forms
