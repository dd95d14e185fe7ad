// csrc/device/wgmma.cuh for the emulator: the same functions. See products.h for when a product reads and writes.
#pragma once

#include <type_traits>

#include "emulator.h"
#include "products.h"

namespace fsa {

inline void wgmma_fence() {
    emulator::fence_product_registers();
}

inline void wgmma_commit() {
    emulator::commit_products();
}

template <int kPending>
void wgmma_wait() {
    emulator::wait_products(kPending);
}

inline void fence_async_proxy() {
    emulator::fence_async_proxy();
}

enum class Major { kSum, kOuter };

template <typename T>
constexpr emulator::ProductType kProductType =
    std::is_same_v<T, __half> ? emulator::ProductType::kHalf : emulator::ProductType::kBfloat16;

template <typename T, Major kMajorA, Major kMajorB, int kRegisters>
void wgmma_ss(float (&d)[kRegisters], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
    static_assert(kRegisters == 16 || kRegisters == 32 || kRegisters == 48 || kRegisters == 64, "32 to 128 columns");
    emulator::issue_product(
        {kProductType<T>, 2 * kRegisters, false, kMajorA == Major::kOuter, kMajorB == Major::kOuter, a_descriptor,
         b_descriptor, accumulate},
        d, nullptr);
}

template <typename T, Major kMajorB, int kRegisters>
void wgmma_rs(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {
    static_assert(kRegisters == 16 || kRegisters == 32 || kRegisters == 48 || kRegisters == 64, "32 to 128 columns");
    emulator::issue_product(
        {kProductType<T>, 2 * kRegisters, true, false, kMajorB == Major::kOuter, 0, b_descriptor, accumulate}, d, a);
}

}  // namespace fsa
