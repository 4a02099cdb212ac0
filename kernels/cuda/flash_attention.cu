#include "kernels/cuda/flash_attention.cuh"
#include "kernels/cuda/launchers.h"

namespace ivr::cuda {
namespace {

template <typename T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    flash_attention_kernel(const __grid_constant__ FlashAttentionParams params) {
  flash_attention_block<T, kD>(params);
}

}  // namespace

cudaError_t flash_attention(const FlashAttentionParams& params, cudaStream_t stream) {
  if (params.a.T == 0 || params.a.K == 0) return cudaSuccess;
  if (!flash_attention_supported(params)) return cudaErrorInvalidValue;
  const FlashAttentionConfig c = flash_attention_config(params);
  const dim3 grid(c.blocks, static_cast<unsigned>(params.a.K));
  cudaError_t error = cudaSuccess;
  with_flash_attention_kernel(params.a.dtype, c, [&]<typename T, int kD>() {
    error = allow_shared_bytes(flash_attention_kernel<T, kD>, c.shared_bytes);
    if (error != cudaSuccess) return;
    flash_attention_kernel<T, kD><<<grid, kAttentionThreads, c.shared_bytes, stream>>>(params);
    error = cudaGetLastError();
  });
  return error;
}

}  // namespace ivr::cuda
