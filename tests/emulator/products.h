// The asynchronous products of a warpgroup (wgmma), for device/wgmma.cuh.
#pragma once

#include "emulator.h"

namespace emulator {

enum class ProductType { kHalf, kBfloat16 };

// What all threads of the warpgroup say alike.
struct ProductInstruction {
    ProductType type;
    int columns;
    bool a_in_registers;
    bool a_outer_major, b_outer_major;  // else the sum is contiguous
    uint64_t a_descriptor, b_descriptor;
    bool accumulate;

    bool operator==(const ProductInstruction&) const = default;
};

// A collective of the running warpgroup: D (64 x columns) = A (64 x 16) B (16 x columns) [+ D]. `d` and `a` are the
// running thread's registers.
//
// Asynchronous as the PTX ISA allows: operands in shared memory are read, and the product is computed, when the first
// thread waits for it; a thread's `d` is NaN until it has waited itself. `a` is read at once.
void issue_product(const ProductInstruction& instruction, float* d, const uint32_t* a);

// Orders the running thread's registers before its products.
void fence_product_registers();

void commit_products();
void wait_products(int pending_batches);

// Around every CTA.
void begin_products(int threads);
void end_products();

}  // namespace emulator
