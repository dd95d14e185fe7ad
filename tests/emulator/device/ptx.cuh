// csrc/device/ptx.cuh for the emulator: the same functions, each by the instruction's definition in the PTX ISA.
#pragma once

#include <cstring>

#include "emulator.h"

namespace fsa {

inline void* dynamic_shared_memory() {
    return emulator::shared_memory();
}

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulator::shared_memory());
}

inline unsigned char* shared_pointer(uint32_t address, int bytes) {
    if (address % bytes != 0) emulator::fail("misaligned shared-memory access");
    if (address + bytes > static_cast<uint32_t>(emulator::shared_memory_bytes()))
        emulator::fail("shared-memory access out of bounds");
    return emulator::shared_memory() + address;
}

inline void mbarrier_init(uint32_t barrier, int arrivals) {
    emulator::mbarrier_init(barrier, arrivals);
}

inline void mbarrier_arrive(uint32_t barrier) {
    emulator::mbarrier_arrive(barrier);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    emulator::mbarrier_wait(barrier, parity);
}

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("misaligned global address");
    emulator::defer_copy(shared_pointer(shared, 16), valid ? global : nullptr, 16);
}

inline void cp_async_16(uint32_t shared, const void* global, bool valid, uint64_t) {
    cp_async_16(shared, global, valid);
}

inline uint64_t evict_last_policy() {
    return 0;
}

inline void cp_async_8(uint32_t shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 8 != 0) emulator::fail("misaligned global address");
    emulator::defer_copy(shared_pointer(shared, 8), global, 8);
}

inline void cp_async_4(uint32_t shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 4 != 0) emulator::fail("misaligned global address");
    emulator::defer_copy(shared_pointer(shared, 4), global, 4);
}

inline void cp_async_commit() {
    emulator::commit_copies();
}

template <int kPending>
void cp_async_wait() {
    emulator::wait_copies(kPending);
}

template <int kRegisters>
void release_registers() {}

template <int kRegisters>
void claim_registers() {}

inline void store_global_16(void* global, const uint4& v, bool valid) {
    if (!valid) return;
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("misaligned global address");
    std::memcpy(global, &v, 16);
}

inline void store_global_16_streaming(void* global, const uint4& v, bool valid) {
    store_global_16(global, v, valid);
}

inline void store_global_4(float* global, float value, uint64_t /*l2_policy*/) {
    *global = value;
}

inline uint4 load_shared_16(uint32_t shared) {
    uint4 v;
    std::memcpy(&v, shared_pointer(shared, 16), 16);
    return v;
}

inline uint32_t load_shared_4(uint32_t shared) {
    uint32_t value;
    std::memcpy(&value, shared_pointer(shared, 4), 4);
    return value;
}

inline void store_shared_4(uint32_t shared, uint32_t value) {
    std::memcpy(shared_pointer(shared, 4), &value, 4);
    emulator::note_shared_write(shared);
}

struct MatrixLoad {
    uint32_t address;
    uint32_t r[4];
};

inline void ldmatrix(const char* where, uint32_t (&r)[4], uint32_t shared, bool transposed) {
    const MatrixLoad result =
        emulator::warp_collective(where, MatrixLoad{shared, {}}, [transposed](const MatrixLoad(&lanes)[32], int lane) {
            MatrixLoad out = {};
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (int i = 0; i < 2; ++i) {
                    // plain: row lane / 4, columns 2c, 2c + 1; transposed: column lane / 4, rows 2c, 2c + 1
                    const int major = lane / 4, minor = lane % 4 * 2 + i;
                    const int row = transposed ? minor : major, column = transposed ? major : minor;
                    const unsigned char* from = shared_pointer(lanes[matrix * 8 + row].address, 16);
                    std::memcpy(&pair[i], from + column * 2, 2);
                }
                out.r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
            return out;
        });
    for (int i = 0; i < 4; ++i) r[i] = result.r[i];
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    ldmatrix("ldmatrix", r, shared, false);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
    ldmatrix("ldmatrix.trans", r, shared, true);
}

struct MatrixStore {
    uint32_t address;
    uint32_t r[4];
};

inline void stmatrix_x4(uint32_t shared, const uint32_t (&r)[4]) {
    emulator::warp_collective(
        "stmatrix", MatrixStore{shared, {r[0], r[1], r[2], r[3]}}, [](const MatrixStore(&lanes)[32], int lane) {
            // the words of row lane % 8 of matrix lane / 8 come from the four lanes that hold that row
            for (int word = 0; word < 4; ++word) {
                const uint32_t value = lanes[lane % 8 * 4 + word].r[lane / 8];
                std::memcpy(shared_pointer(lanes[lane].address, 16) + word * 4, &value, 4);
            }
            return lanes[lane];
        });
    emulator::note_shared_write(shared);
}

struct MmaFragments {
    float c[4];
    uint32_t a[4], b[2];
};

template <typename T>
float element(uint32_t word, int i) {
    const uint16_t bits = static_cast<uint16_t>(i == 0 ? word : word >> 16);
    return static_cast<float>(std::bit_cast<T>(bits));
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MmaFragments own = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::meet_warp("mma", &own, [](void* const(&arguments)[32]) {
        auto lane_of = [&](int lane) -> MmaFragments& { return *static_cast<MmaFragments*>(arguments[lane]); };
        float a_matrix[16][16], b_matrix[16][8];
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                a_matrix[row][k] = element<T>(lane_of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k % 2);
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column)
                b_matrix[k][column] = element<T>(lane_of(column * 4 + k % 8 / 2).b[k / 8], k % 2);
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 8; ++column) {
                float& sum = lane_of(row % 8 * 4 + column / 2).c[row / 8 * 2 + column % 2];
                for (int k = 0; k < 16; ++k) sum += a_matrix[row][k] * b_matrix[k][column];
            }
    });
    for (int i = 0; i < 4; ++i) c[i] = own.c[i];
}

template <typename T>
uint32_t add_zero_times(uint32_t x, uint32_t sum) {
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
        const T half(std::fma(element<T>(x, i), 0.f, element<T>(sum, i)));
        result |= static_cast<uint32_t>(std::bit_cast<uint16_t>(half)) << 16 * i;
    }
    return result;
}

inline float exp2_approx(float x) {
    return std::exp2(x);
}

inline float reciprocal_approx(float x) {
    return 1.f / x;
}

inline bool uniform(bool condition) {
    return __any_sync(~0u, condition);
}

inline uint32_t uniform_value(uint32_t value) {
    return __shfl_sync(~0u, value, 0);
}

inline int thread_index_unhoisted() {
    return static_cast<int>(threadIdx.x);
}

inline uint32_t computed_here(uint32_t x) {
    return x;
}

inline float computed_here(float x) {
    return x;
}

}  // namespace fsa
