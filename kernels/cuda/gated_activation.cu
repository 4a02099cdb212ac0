#include "kernels/cuda/gated_activation.cuh"
#include "kernels/cuda/launchers.h"

namespace ivr::cuda {
namespace {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kChunkThreads)
    gated_activation_kernel(const __grid_constant__ GatedActivationParams params, unsigned chunks) {
  gated_activation_block<T, kAligned>(params, chunks);
}

}  // namespace

cudaError_t gated_activation(const GatedActivationParams& params, cudaStream_t stream) {
  if (params.T == 0 || params.I == 0) return cudaSuccess;
  if (!gated_activation_supported(params)) return cudaErrorInvalidValue;
  const ChunkConfig c = gated_activation_config(params);
  with_element(params.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    gated_activation_kernel<T, kAligned>
        <<<static_cast<unsigned>(c.blocks), kChunkThreads, 0, stream>>>(params, c.chunks);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
