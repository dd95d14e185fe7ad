// One PTX instruction a function. Fragment layouts are drawn in the PTX ISA, "Matrix fragments for mma.m16n8k16":
// with g = lane / 4 and c = lane % 4,
//   A (16 x 16): a[0] = row g, k 2c..2c+1   a[1] = row g+8, same k   a[2] = row g, k 2c+8..   a[3] = row g+8, k 2c+8..
//   B (16 x 8):  b[0] = k 2c..2c+1, column g   b[1] = k 2c+8.., column g
//   C (16 x 8):  c[0..1] = row g, columns 2c, 2c+1   c[2..3] = row g+8, same columns
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fsa {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The CTA's dynamic shared memory, aligned for 16-byte accesses and for whole swizzle patterns.
__device__ __forceinline__ void* dynamic_shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

// Waits until the kernels before this one in its stream are done and what they wrote is seen. sm_90
__device__ __forceinline__ void griddepcontrol_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Copies 16 bytes from global to shared memory; writes zeros instead when !valid (nothing is read then).
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// The same, with what L2 is to do with the lines.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid, uint64_t l2_policy) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
                 "r"(bytes), "l"(l2_policy)
                 : "memory");
}

// A policy for lines that L2 is to keep when it needs room: others go first.
__device__ __forceinline__ uint64_t evict_last_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Copies 8 or 4 bytes, asynchronously like cp_async_16.
__device__ __forceinline__ void cp_async_8(uint32_t shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Barriers in shared memory, 8 bytes each. A phase ends with the arrival of as many threads as the barrier was made for, and
// of the bytes that these expect (tma.cuh); what they wrote before is seen by whoever has waited for the phase. Phases are
// told apart by their parity: 0, 1, 0, ...
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{.reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra wait;}" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}

// From here on the threads of this warpgroup have kRegisters registers each, fewer than before. From sm_90 on.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The same, more than before, once others have released as many.
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores 16 bytes if valid, without a branch.
__device__ __forceinline__ void store_global_16(void* global, const uint4& v, bool valid) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(global),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(valid))
                 : "memory");
}

// The same, of what nobody reads soon: L2 lets go of it first.
__device__ __forceinline__ void store_global_16_streaming(void* global, const uint4& v, bool valid) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(global),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(valid))
                 : "memory");
}

// Stores 4 bytes, with what L2 is to do with the line.
__device__ __forceinline__ void store_global_4(float* global, float value, uint64_t l2_policy) {
    asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(global), "f"(value), "l"(l2_policy) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t shared) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t shared) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared_4(uint32_t shared, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// Four 8 x 8 matrices to shared memory, as ldmatrix_x4 reads them. From sm_90 on.
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 0 * x + sum, for both halves of a word: from then on a half of `sum` is NaN once x was inf or NaN.
template <typename T>
__device__ __forceinline__ uint32_t add_zero_times(uint32_t x, uint32_t sum) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(0));
    } else {
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(0));
    }
    return sum;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A condition on which all lanes of the warp agree, so that the compiler knows: what follows from it is then computed once
// a warp, by the uniform datapath.
__device__ __forceinline__ bool uniform(bool condition) {
    return __any_sync(~0u, condition);
}

// The same of a number, such as an address in the descriptors of products.
__device__ __forceinline__ uint32_t uniform_value(uint32_t value) {
    return __shfl_sync(~0u, value, 0);
}

// threadIdx.x, read anew at every call: what is computed from it is not hoisted out of a persistent loop, where a
// dozen addresses used once an item would hold registers that the inner loop needs.
__device__ __forceinline__ int thread_index_unhoisted() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Its argument, which compilers do not compute any later than where this stands.
__device__ __forceinline__ uint32_t computed_here(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ float computed_here(float x) {
    asm volatile("" : "+f"(x));
    return x;
}

}  // namespace fsa
