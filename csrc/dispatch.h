// Run-time values to compile-time constants. The instantiations of the main kernels are listed in CMakeLists.txt and
// nowhere else; what is asked for here and not listed there fails to link, what is not asked for here throws.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// Calls f(Constant<n>()) with the number of lanes, a power of two, that cover a row by 8 elements each.
template <typename F>
void dispatch_row_lanes(int head_dim, F&& f) {
    if (head_dim <= 0 || head_dim > 256) no_instantiation("head_dim", head_dim);
    if (head_dim <= 64) return f(Constant<8>());
    if (head_dim <= 128) return f(Constant<16>());
    f(Constant<32>());
}

}  // namespace fsa
