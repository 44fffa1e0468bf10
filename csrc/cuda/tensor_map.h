// Descriptions of matrices in global memory for Hopper's tile copies. libcuda is not linked: the encoder is asked of the
// driver that the runtime has loaded.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels.h"

namespace qlora_engine::cuda {

// A row-major matrix and the box that one copy moves. 16-byte alignment: the address, and `pitch`. A box of 32, 64 or
// 128 bytes a row is swizzled by that width where `swizzled`; what lies outside reads as zero and is not written.
struct TileMap {
  const void* data;
  CUtensorMapDataType type;
  uint64_t columns, rows, pitch;  // elements, rows, bytes
  uint32_t box_columns, box_rows;
  bool swizzled;
};

inline CUtensorMapDataType tile_type(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

inline cudaError_t encode(const TileMap& tile, CUtensorMap* map) {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static const Encoder encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encoder>(found) : nullptr;
  }();
  if (encoder == nullptr) return cudaErrorNotSupported;
  const uint64_t element = tile.type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1
                           : tile.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                                                                          : 2;
  const uint64_t width = tile.box_columns * element;
  const CUtensorMapSwizzle swizzle = !tile.swizzled ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : width == 64  ? CU_TENSOR_MAP_SWIZZLE_64B
                                                    : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint64_t sizes[2] = {tile.columns, tile.rows}, pitches[1] = {tile.pitch};
  const cuuint32_t box[2] = {tile.box_columns, tile.box_rows}, strides[2] = {1, 1};
  const CUresult result = encoder(map, tile.type, 2, const_cast<void*>(tile.data), sizes, pitches, box, strides,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace qlora_engine::cuda
