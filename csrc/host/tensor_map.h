// Tensor maps of the tensors that kernels load by TMA (device/tma.cuh).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "device/tma.cuh"
#include "launch.h"
#include "params.h"

namespace fsa {

// The driver's function, by the runtime: this library must load where there is no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        check_cuda(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "cudaGetDriverEntryPointByVersion");
#else
        check_cuda(
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
            "cudaGetDriverEntryPoint");
#endif
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no tensor maps");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return encoder;
}

// The map of a tensor whose boxes are rows of panels of Tile (device/wgmma_tile.h). Sizes and the box are elements, strides
// bytes and not 0, from the innermost dimension out, which has no stride. Zeros stand for what lies behind the tensor's ends.
// promotion: what L2 fetches from memory at least.
template <typename T, typename Tile, int kDimensions>
TensorMap encode_tensor_map(
    const void* data, const cuuint64_t (&sizes)[kDimensions], const cuuint64_t (&strides)[kDimensions - 1],
    const cuuint32_t (&box)[kDimensions], CUtensorMapL2promotion promotion) {
    constexpr auto kType =
        std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    constexpr auto kSwizzle = Tile::kRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    cuuint32_t steps[kDimensions];
    for (cuuint32_t& step : steps) step = 1;
    TensorMap map;
    const CUresult status = tensor_map_encoder()(
        &map, kType, kDimensions, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        kSwizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("CUDA error " + std::to_string(status) + " in cuTensorMapEncodeTiled");
    return map;
}

// A [num_tokens, num_heads, head_dim] tensor whose boxes are panels of Tile of one head: coordinates are column, head, token.
template <typename T, typename Tile>
TensorMap make_tensor_map(const RowTensor& tensor, int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
    const cuuint64_t sizes[3] = {
        static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(num_heads), static_cast<cuuint64_t>(num_tokens)};
    const cuuint64_t strides[2] = {tensor.head_stride * sizeof(T), tensor.token_stride * sizeof(T)};
    return encode_tensor_map<T, Tile, 3>(
        tensor.data, sizes, strides, {Tile::kPanelColumns, 1, Tile::kNumRows}, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// o_partial of a chunk, whose boxes are the same partial of some neighbouring queries, of `heads` heads of each: coordinates
// are column, group head, partial, query of the chunk. A box may reach over a head's last query, and over the tensor's end.
template <typename Tile>
TensorMap make_partial_map(const __half* o_partial, const Geometry& g, int heads, int queries) {
    const cuuint64_t sizes[4] = {
        static_cast<cuuint64_t>(g.head_dim), static_cast<cuuint64_t>(g.group_size),
        static_cast<cuuint64_t>(g.topk) * g.subs, static_cast<cuuint64_t>(g.num_heads) * g.num_queries};
    const cuuint64_t row_bytes = sizes[0] * sizeof(__half);
    const cuuint64_t strides[3] = {row_bytes, row_bytes * sizes[1], row_bytes * sizes[1] * sizes[2]};
    return encode_tensor_map<__half, Tile, 4>(
        o_partial, sizes, strides,
        {Tile::kPanelColumns, static_cast<cuuint32_t>(heads), 1, static_cast<cuuint32_t>(queries)},
        CU_TENSOR_MAP_L2_PROMOTION_NONE);
}

}  // namespace fsa
