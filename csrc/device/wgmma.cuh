// Warpgroup-level MMA of sm_90a, one PTX instruction a function. All four warps of a warpgroup call these together.
//
// D (64 x N, fp32) += A (64 x 16) B (16 x N). Warp w of the warpgroup has rows 16w .. 16w + 15 of D, and of an A in
// registers; its lanes hold them as in mma.m16n8k16 (ptx.cuh): d[4n .. 4n + 3] are the accumulators of columns
// 8n .. 8n + 7. Operands in shared memory are named by descriptors, see device/wgmma_tile.h.
//
// Order: wgmma_fence() before the first product of a batch, after the last ordinary write to its registers;
// wgmma_commit() behind the batch; registers of D and A are not touched until wgmma_wait() says that it is done.
// Shared memory written by ordinary stores or cp.async is read by products only after fence_async_proxy() of the
// threads that wrote it and a barrier.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fsa {

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed batches are not done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Makes this thread's writes to shared memory visible to products and to the copy engine (tma.cuh).
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// How an operand in shared memory lies: its rows are rows of A (columns of B), each contiguous along the sum; or its
// rows run along the sum, each contiguous along the rows of A (columns of B).
enum class Major { kSum, kOuter };

// The accumulators as operands of asm: 4, 16 of them from d[i] on.
#define FSA_WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FSA_WGMMA_16(i) FSA_WGMMA_4(i), FSA_WGMMA_4(i + 4), FSA_WGMMA_4(i + 8), FSA_WGMMA_4(i + 12)
// Their names in the instruction.
#define FSA_WGMMA_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FSA_WGMMA_NAMES_32 FSA_WGMMA_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FSA_WGMMA_NAMES_48 FSA_WGMMA_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FSA_WGMMA_NAMES_64 FSA_WGMMA_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// One instruction; n0, n1, ... name the operands behind the accumulators.
#define FSA_WGMMA_SS(columns, type, names, n0, n1, n2, n3, n4, n5, n6, ...)                                           \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " n0 ", 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type \
                 "." type " {" names "}, " n1 ", " n2 ", p, 1, 1, " n3 ", " n4 ";}"                                   \
                 : __VA_ARGS__                                                                                        \
                 : "r"(static_cast<int>(accumulate)), "l"(a_descriptor), "l"(b_descriptor), "n"(kA), "n"(kB))
#define FSA_WGMMA_RS(columns, type, names, n0, n1, n2, n3, n4, n5, n6, ...)                                           \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " n0 ", 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type \
                 "." type " {" names "}, {" n1 "," n2 "," n3 "," n4 "}, " n5 ", p, 1, 1, " n6 ";}"                    \
                 : __VA_ARGS__                                                                                        \
                 : "r"(static_cast<int>(accumulate)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor),  \
                   "n"(kB))

// The instruction for kRegisters accumulators.
#define FSA_WGMMA_OF_WIDTH(FSA_WGMMA_FORM, type)                                                               \
    if constexpr (kRegisters == 16) {                                                                          \
        FSA_WGMMA_FORM(                                                                                        \
            "32", type, FSA_WGMMA_NAMES_16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", FSA_WGMMA_16(0)); \
    } else if constexpr (kRegisters == 32) {                                                                   \
        FSA_WGMMA_FORM(                                                                                        \
            "64", type, FSA_WGMMA_NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", FSA_WGMMA_16(0),  \
            FSA_WGMMA_16(16));                                                                                 \
    } else if constexpr (kRegisters == 48) {                                                                   \
        FSA_WGMMA_FORM(                                                                                        \
            "96", type, FSA_WGMMA_NAMES_48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", FSA_WGMMA_16(0),  \
            FSA_WGMMA_16(16), FSA_WGMMA_16(32));                                                               \
    } else {                                                                                                   \
        FSA_WGMMA_FORM(                                                                                        \
            "128", type, FSA_WGMMA_NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", FSA_WGMMA_16(0), \
            FSA_WGMMA_16(16), FSA_WGMMA_16(32), FSA_WGMMA_16(48));                                             \
    }

// d (64 x 2 * kRegisters) = A B, or += when accumulate; both operands from shared memory.
template <typename T, Major kMajorA, Major kMajorB, int kRegisters>
__device__ __forceinline__ void wgmma_ss(
    float (&d)[kRegisters], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
    static_assert(kRegisters == 16 || kRegisters == 32 || kRegisters == 48 || kRegisters == 64, "32 to 128 columns");
    constexpr int kA = kMajorA == Major::kOuter, kB = kMajorB == Major::kOuter;
    if constexpr (std::is_same_v<T, __half>) {
        FSA_WGMMA_OF_WIDTH(FSA_WGMMA_SS, "f16")
    } else {
        FSA_WGMMA_OF_WIDTH(FSA_WGMMA_SS, "bf16")
    }
}

// The same with A from registers.
template <typename T, Major kMajorB, int kRegisters>
__device__ __forceinline__ void wgmma_rs(
    float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {
    static_assert(kRegisters == 16 || kRegisters == 32 || kRegisters == 48 || kRegisters == 64, "32 to 128 columns");
    constexpr int kB = kMajorB == Major::kOuter;
    if constexpr (std::is_same_v<T, __half>) {
        FSA_WGMMA_OF_WIDTH(FSA_WGMMA_RS, "f16")
    } else {
        FSA_WGMMA_OF_WIDTH(FSA_WGMMA_RS, "bf16")
    }
}

}  // namespace fsa
