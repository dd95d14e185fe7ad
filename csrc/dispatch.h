// Run-time values to compile-time constants. The instantiations of the main kernels are listed in CMakeLists.txt and
// nowhere else; what is asked for here and not listed there fails to link, what is not asked for here throws.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fsa {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

[[noreturn]] inline void no_instantiation(const char* what, int value) {
    throw std::runtime_error(std::string("fsa: no kernel is built for ") + what + " = " + std::to_string(value));
}

// Calls f(T()) with the element type.
template <typename F>
void dispatch_dtype(bool is_bf16, F&& f) {
    if (is_bf16) {
        f(__nv_bfloat16());
    } else {
        f(__half());
    }
}

// Calls f(Constant<n>()) with the smallest kernel width n >= head_dim.
template <typename F>
void dispatch_head_dim(int head_dim, F&& f) {
    if (head_dim <= 0 || head_dim > 256) no_instantiation("head_dim", head_dim);
    if (head_dim <= 64) return f(Constant<64>());
    if (head_dim <= 96) return f(Constant<96>());
    if (head_dim <= 128) return f(Constant<128>());
    if (head_dim <= 192) return f(Constant<192>());
    f(Constant<256>());
}

// Calls f(Constant<tile_k>()) when the forward has kernels of that tile at this width.
template <int kHeadDim, typename F>
void dispatch_forward_tile_k(int tile_k, F&& f) {
    if (tile_k == 32) return f(Constant<32>());
    if (tile_k == 64) return f(Constant<64>());
    if constexpr (kHeadDim <= 128) {
        if (tile_k == 128) return f(Constant<128>());
    }
    no_instantiation("forward tile_k", tile_k);
}

// Calls f(Constant<tile_k>()) when the backward has kernels of that tile at this width.
template <int kHeadDim, typename F>
void dispatch_backward_tile_k(int tile_k, F&& f) {
    if (tile_k == 32) return f(Constant<32>());
    if constexpr (kHeadDim <= 192) {
        if (tile_k == 64) return f(Constant<64>());
    }
    no_instantiation("backward tile_k", tile_k);
}

// Whether the backward has a kernel for sm_90a at this width and tile: wider rows and narrower tiles do not fit wgmma's
// 64 rows and one warpgroup's registers. The forward has one for every width and tile.
constexpr bool has_backward_sm90(int head_dim, int tile_k) {
    return head_dim <= 128 && tile_k == 64;
}

// Whether there is a kernel for the scores of blocks of that many strides, on sm_90a, which has room for a few whole blocks in
// a tile and reads four windows at a time.
constexpr bool has_block_scores(int ratio) {
    return ratio == 4 || ratio == 8 || ratio == 16;
}

// arch: the newest GPU architecture whose kernels may run, 80 or 90. Calls sm90() when it is 90 and there is such a
// kernel, else sm80().
template <bool kHasSm90, typename Sm80, typename Sm90>
void dispatch_arch(int64_t arch, Sm80&& sm80, Sm90&& sm90) {
    if (arch != 80 && arch != 90) no_instantiation("arch", static_cast<int>(arch));
    if (arch == 90) {
#ifdef FSA_SM90
        if constexpr (kHasSm90) return sm90();
#else
        throw std::runtime_error("fsa: this build has no kernels for arch = 90");
#endif
    }
    sm80();
}

// Calls f(Constant<n>()) with the number of lanes, a power of two, that cover a row by 8 elements each.
template <typename F>
void dispatch_row_lanes(int head_dim, F&& f) {
    if (head_dim <= 0 || head_dim > 256) no_instantiation("head_dim", head_dim);
    if (head_dim <= 64) return f(Constant<8>());
    if (head_dim <= 128) return f(Constant<16>());
    f(Constant<32>());
}

}  // namespace fsa
