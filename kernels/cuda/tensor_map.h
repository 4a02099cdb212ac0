// Tensor maps on the host. The driver encodes them; its entry point is asked for at the first call,
// so that nothing links against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "kernels/cuda/prim.cuh"

namespace ivr::cuda {

// cudaErrorInvalidValue: the driver refuses the box; cudaErrorSymbolNotFound: it is older
// than 12.0.
inline cudaError_t make_tensor_map(const TensorBox& box, TensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    constexpr unsigned kVersion = 12000;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               kVersion, cudaEnableDefault, &found);
    const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<Encode>(there ? entry : nullptr);
  }();
  if (encode == nullptr) return cudaErrorSymbolNotFound;

  cuuint64_t sizes[TensorBox::kMaxRank], strides[TensorBox::kMaxRank - 1];
  cuuint32_t counts[TensorBox::kMaxRank], steps[TensorBox::kMaxRank];
  for (int d = 0; d < box.rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(box.sizes[d]);
    counts[d] = static_cast<cuuint32_t>(box.box[d]);
    steps[d] = 1;
    if (d > 0) strides[d - 1] = static_cast<cuuint64_t>(box.strides[d]);
  }
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE,
                                              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B,
                                              CU_TENSOR_MAP_SWIZZLE_32B};
  const CUtensorMapDataType type =
      box.strides[0] == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  CUtensorMap encoded;
  const CUresult result =
      encode(&encoded, type, static_cast<cuuint32_t>(box.rank), const_cast<void*>(box.base), sizes,
             strides, counts, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             kSwizzles[static_cast<int>(box.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  static_assert(sizeof(map) == sizeof(encoded) && alignof(TensorMap) % alignof(CUtensorMap) == 0);
  std::memcpy(&map, &encoded, sizeof(map));
  return cudaSuccess;
}

}  // namespace ivr::cuda
