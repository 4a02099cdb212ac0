#include "kernels/cuda/launchers.h"
#include "kernels/cuda/pixel_unshuffle_mlp.cuh"

namespace ivr::cuda {
namespace {

// The 1: without it the element-by-element variant spills to make room for a second block.
template <typename T, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kRowMaxThreads, 1)
    pixel_unshuffle_kernel(const __grid_constant__ PixelUnshuffleParams params) {
  pixel_unshuffle_block<T, kVectors, kAligned>(params);
}

}  // namespace

cudaError_t pixel_unshuffle_norm(const PixelUnshuffleParams& params, cudaStream_t stream) {
  if (params.t == 0 || params.C == 0) return cudaSuccess;
  if (!pixel_unshuffle_supported(params)) return cudaErrorInvalidValue;
  const RowConfig config = pixel_unshuffle_config(params);
  const dim3 block(config.threads_per_row, config.rows_per_block);
  with_row_kernel(params.dtype, config, [&]<typename T, int kVectors, bool kAligned>() {
    pixel_unshuffle_kernel<T, kVectors, kAligned><<<config.blocks, block, 0, stream>>>(params);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
