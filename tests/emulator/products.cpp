#include "products.h"

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

namespace emulator {
namespace {

constexpr int kThreads = 128, kRows = 64, kSum = 16, kMaxColumns = 256;
constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN: accumulators of unfinished products

// The accumulators of a chain of products. They leave the threads' registers for as long as a product is unfinished.
struct Accumulators {
    int columns;
    float* registers[kThreads];
    int unfinished[kThreads] = {};  // products that a thread has not waited for
    std::vector<float> sums;        // [row][column]
};

struct Product {
    ProductInstruction instruction;
    std::shared_ptr<Accumulators> d;
    float a[kRows][kSum];  // of registers
    bool done = false;
};

struct PendingProduct {
    std::shared_ptr<Product> product;
    int batch;
};

struct Thread {
    std::deque<PendingProduct> products;
    int batch = 0;  // products issued now belong to it
    bool registers_fenced = false;
};

std::vector<Thread> threads;
std::vector<std::vector<std::shared_ptr<Accumulators>>> unfinished_of_warpgroup;

// Matrix descriptor of wgmma, as the PTX ISA defines it.
struct Descriptor {
    uint32_t start, leading, stride;  // bytes
    uint32_t row_bytes;               // of a row of the swizzle pattern; its 8 rows follow one another

    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
        const uint64_t swizzle = bits >> 62;
        if (swizzle != 1 && swizzle != 2) fail("a matrix descriptor's swizzle is not of 128 or 64 bytes");
        row_bytes = swizzle == 1 ? 128 : 64;
        if ((bits & 0x3fffc000c000c000) != 0) fail("a matrix descriptor has bits outside the fields emulated");
        // Else the descriptor needs a base offset.
        if (start % (8 * row_bytes) >= row_bytes) fail("a matrix does not begin in the first row of a swizzle pattern");
    }

    // Where the 16 bytes at an unswizzled address stand.
    uint32_t swizzled(uint32_t address) const {
        const uint32_t pattern = address >> 7 & (row_bytes / 16 - 1);
        return address ^ pattern << 4;
    }
};

// Calls f(outer, k, bytes) for every chunk of 8 elements of an operand; (outer, k) is the first. The others follow
// along the sum or, outer_major, along the rows of A (columns of B).
template <typename F>
void for_each_chunk(uint64_t descriptor_bits, bool outer_major, int outer_size, const F& f) {
    const Descriptor descriptor(descriptor_bits);
    const uint32_t row_bytes = descriptor.row_bytes;
    auto visit = [&](int outer, int k, uint32_t unswizzled) {
        const uint32_t address = descriptor.swizzled(descriptor.start + unswizzled);
        if (address + 16 > static_cast<uint32_t>(shared_memory_bytes()))
            fail("a product reads outside of shared memory");
        if (!visible_to_async_proxy(address))
            fail("a product reads shared memory without fence_async_proxy and a barrier behind the write");
        f(outer, k, shared_memory() + address);
    };
    if (outer_major) {
        const int panel = row_bytes / 2;
        for (int outer = 0; outer < outer_size; outer += 8)
            for (int k = 0; k < kSum; ++k)
                visit(
                    outer, k,
                    outer / panel * descriptor.leading + outer % panel * 2 + k / 8 * descriptor.stride +
                        k % 8 * row_bytes);
    } else {
        for (int outer = 0; outer < outer_size; ++outer)
            for (int k = 0; k < kSum; k += 8)
                visit(outer, k, outer / 8 * descriptor.stride + outer % 8 * row_bytes + k * 2);
    }
}

using Decoded = std::array<float, 1 << 16>;

template <typename T>
std::unique_ptr<Decoded> decode_all() {
    auto table = std::make_unique<Decoded>();
    for (int bits = 0; bits < 1 << 16; ++bits)
        (*table)[bits] = static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(bits)));
    return table;
}

// The value of each bit pattern.
const Decoded& values_of(ProductType type) {
    static const std::unique_ptr<Decoded> half = decode_all<__half>(), bfloat16 = decode_all<__nv_bfloat16>();
    return type == ProductType::kHalf ? *half : *bfloat16;
}

// matrix[outer * outer_stride + k * k_stride]
void decode_operand(
    ProductType type, uint64_t descriptor, bool outer_major, int outer_size, float* matrix, int outer_stride,
    int k_stride) {
    const Decoded& values = values_of(type);
    const int step = outer_major ? outer_stride : k_stride;
    for_each_chunk(descriptor, outer_major, outer_size, [&](int outer, int k, const unsigned char* chunk) {
        uint16_t bits[8];
        std::memcpy(bits, chunk, 16);
        float* to = matrix + outer * outer_stride + k * k_stride;
        for (int i = 0; i < 8; ++i) to[i * step] = values[bits[i]];
    });
}

void compute(Product& product) {
    const ProductInstruction& p = product.instruction;
    if (!p.a_in_registers) decode_operand(p.type, p.a_descriptor, p.a_outer_major, kRows, product.a[0], kSum, 1);
    float b[kSum][kMaxColumns];
    decode_operand(p.type, p.b_descriptor, p.b_outer_major, p.columns, b[0], 1, kMaxColumns);
    std::vector<float>& sums = product.d->sums;
    if (!p.accumulate) std::fill(sums.begin(), sums.end(), 0.f);
    for (int row = 0; row < kRows; ++row) {
        float* sum = &sums[row * p.columns];
        for (int k = 0; k < kSum; ++k) {
            const float a = product.a[row][k];
            for (int column = 0; column < p.columns; ++column) sum[column] += a * b[k][column];
        }
    }
    product.done = true;
}

// Calls f(register, element of [row][column]) for the accumulators of a thread.
template <typename F>
void for_each_accumulator(Accumulators& d, int thread, const F& f) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int i = 0; i < d.columns / 2; ++i) {
        f(d.registers[thread][i], d.sums[(row + i / 2 % 2 * 8) * d.columns + i / 4 * 8 + column + i % 2]);
    }
}

struct Argument {
    ProductInstruction instruction;
    float* d;
    const uint32_t* a;
    int thread;  // of the CTA
};

// The accumulators that the threads name if products on them are unfinished, else null.
std::shared_ptr<Accumulators> find_unfinished(const Argument* const (&arguments)[kThreads]) {
    const int columns = arguments[0]->instruction.columns;
    for (const std::shared_ptr<Accumulators>& d : unfinished_of_warpgroup[arguments[0]->thread / kThreads]) {
        int same = 0;
        for (int thread = 0; thread < kThreads; ++thread) {
            const float *own = arguments[thread]->d, *other = d->registers[thread];
            if (d->unfinished[thread] == 0) continue;
            same += own == other && columns == d->columns;
            if (own != other && own < other + d->columns / 2 && other < own + columns / 2)
                fail("accumulators of a product are part of those of an unfinished one");
        }
        if (same == kThreads) return d;
        if (same > 0) fail("threads of a warpgroup have waited for different products");
    }
    return nullptr;
}

std::shared_ptr<Accumulators> take_accumulators(const Argument* const (&arguments)[kThreads]) {
    const ProductInstruction& p = arguments[0]->instruction;
    auto d = std::make_shared<Accumulators>();
    d->columns = p.columns;
    d->sums.resize(kRows * p.columns);
    for (int thread = 0; thread < kThreads; ++thread) {
        d->registers[thread] = arguments[thread]->d;
        for_each_accumulator(*d, thread, [&](float& own, float& sum) {
            sum = own;
            own = std::bit_cast<float>(kPoison);
        });
    }
    unfinished_of_warpgroup[arguments[0]->thread / kThreads].push_back(d);
    return d;
}

void issue(void* const (&pointers)[kThreads]) {
    const Argument* arguments[kThreads];
    for (int thread = 0; thread < kThreads; ++thread) arguments[thread] = static_cast<Argument*>(pointers[thread]);
    const ProductInstruction& p = arguments[0]->instruction;
    for (const Argument* argument : arguments) {
        if (argument->instruction != p) fail("threads of a warpgroup disagree about a product");
    }
    auto product = std::make_shared<Product>();
    product->instruction = p;
    product->d = find_unfinished(arguments);
    const bool chained = product->d != nullptr;
    for (const Argument* argument : arguments) {
        const Thread& own = threads[argument->thread];
        if (own.batch != threads[arguments[0]->thread].batch) fail("threads of a warpgroup have committed differently");
        if (!own.registers_fenced && (!chained || p.a_in_registers)) fail("a batch of products without wgmma_fence");
    }
    if (!chained) product->d = take_accumulators(arguments);

    // What is wrong with the operands now is wrong even if it is mended before they are read.
    const auto no_op = [](int, int, const unsigned char*) {};
    for_each_chunk(p.b_descriptor, p.b_outer_major, p.columns, no_op);
    if (!p.a_in_registers) for_each_chunk(p.a_descriptor, p.a_outer_major, kRows, no_op);
    for (int thread = 0; thread < kThreads; ++thread) {
        for (int i = 0; p.a_in_registers && i < 8; ++i) {
            const uint32_t word = arguments[thread]->a[i / 2];
            const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
            const int k = i / 4 * 8 + thread % 4 * 2 + i % 2;
            product->a[row][k] = values_of(p.type)[i % 2 == 0 ? word & 0xffff : word >> 16];
        }
        Thread& own = threads[arguments[thread]->thread];
        ++product->d->unfinished[thread];
        own.products.push_back({product, own.batch});
    }
}

// A thread has waited for all products on its accumulators.
void return_accumulators(Accumulators& d, int thread) {
    for_each_accumulator(d, thread, [](float& own, float& sum) {
        if (std::bit_cast<uint32_t>(own) != kPoison) fail("accumulators were written before their product was done");
        own = sum;
    });
}

}  // namespace

void issue_product(const ProductInstruction& instruction, float* d, const uint32_t* a) {
    Argument own = {instruction, d, a, static_cast<int>(thread_index().x)};
    meet_warpgroup("wgmma", &own, issue);
}

void fence_product_registers() {
    threads[thread_index().x].registers_fenced = true;
}

void commit_products() {
    Thread& own = threads[thread_index().x];
    ++own.batch;
    own.registers_fenced = false;
}

void wait_products(int pending_batches) {
    const int thread = thread_index().x;
    Thread& own = threads[thread];
    while (!own.products.empty() && own.products.front().batch < own.batch - pending_batches) {
        Product& product = *own.products.front().product;
        if (!product.done) compute(product);
        if (--product.d->unfinished[thread % kThreads] == 0) {
            return_accumulators(*product.d, thread % kThreads);
            std::erase_if(unfinished_of_warpgroup[thread / kThreads], [](const auto& d) {
                return std::all_of(d->unfinished, d->unfinished + kThreads, [](int n) { return n == 0; });
            });
        }
        own.products.pop_front();
    }
}

void begin_products(int num_threads) {
    threads.assign(num_threads, {});
    unfinished_of_warpgroup.assign(num_threads / kThreads, {});
}

void end_products() {
    for (const Thread& thread : threads) {
        if (!thread.products.empty()) fail("a thread ended without waiting for its products");
    }
}

}  // namespace emulator
