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

// A [num_tokens, num_heads, head_dim] tensor whose boxes are panels of Tile (device/wgmma_tile.h) of one head: coordinates
// are column, head, token. Zeros stand for what lies behind the tensor's ends. Strides are not 0 (fsa/pipeline.py).
template <typename T, typename Tile>
TensorMap make_tensor_map(const RowTensor& tensor, int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
    constexpr auto kType =
        std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    constexpr auto kSwizzle = Tile::kRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const cuuint64_t sizes[3] = {
        static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(num_heads), static_cast<cuuint64_t>(num_tokens)};
    const cuuint64_t strides[2] = {
        static_cast<cuuint64_t>(tensor.head_stride) * sizeof(T),
        static_cast<cuuint64_t>(tensor.token_stride) * sizeof(T)};
    const cuuint32_t box[3] = {Tile::kPanelColumns, 1, Tile::kNumRows}, steps[3] = {1, 1, 1};
    TensorMap map;
    const CUresult status = tensor_map_encoder()(
        &map, kType, 3, const_cast<void*>(tensor.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        kSwizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("CUDA error " + std::to_string(status) + " in cuTensorMapEncodeTiled");
    return map;
}

}  // namespace fsa
