#include "kernels/cuda/launchers.h"
#include "kernels/cuda/layer_norm.cuh"

namespace ivr::cuda {
namespace {

template <typename T, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kRowMaxThreads)
    layer_norm_kernel(const __grid_constant__ LayerNormParams params) {
  layer_norm_block<T, kVectors, kAligned>(params);
}

}  // namespace

cudaError_t layer_norm(const LayerNormParams& params, cudaStream_t stream) {
  if (params.T == 0 || params.C == 0) return cudaSuccess;
  if (!layer_norm_supported(params)) return cudaErrorInvalidValue;
  const RowConfig config = layer_norm_config(params);
  const dim3 block(config.threads_per_row, config.rows_per_block);
  with_row_kernel(params.dtype, config, [&]<typename T, int kVectors, bool kAligned>() {
    layer_norm_kernel<T, kVectors, kAligned><<<config.blocks, block, 0, stream>>>(params);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
