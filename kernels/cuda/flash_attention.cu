#include "kernels/cuda/flash_attention.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"

namespace ivr::cuda {
namespace {

template <typename T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    flash_attention_kernel(const __grid_constant__ FlashAttentionParams params) {
  flash_attention_block<T, kD>(params);
}

template <int kD>
__global__ void __launch_bounds__(kWgmmaThreads<kD>, 1)
    flash_attention_wgmma_kernel(const __grid_constant__ FlashAttentionParams params,
                                 const __grid_constant__ KeyMaps<TensorMap> maps) {
#if defined(IVR_HAS_WGMMA)
  flash_attention_wgmma_block<kD>(params, maps);
#else
  trap();
#endif
}

template <int kD>
cudaError_t launch_wgmma(const FlashAttentionParams& params, const FlashAttentionConfig& c,
                         cudaStream_t stream) {
  const KeyMaps<TensorBox> boxes = key_boxes(params);
  KeyMaps<TensorMap> maps;
  cudaError_t error = make_tensor_map(boxes.k, maps.k);
  if (error == cudaSuccess) error = make_tensor_map(boxes.v, maps.v);
  if (error == cudaSuccess) {
    error = allow_shared_bytes(flash_attention_wgmma_kernel<kD>, c.shared_bytes);
  }
  if (error != cudaSuccess) return error;
  const unsigned blocks = c.blocks * static_cast<unsigned>(params.a.K);
  flash_attention_wgmma_kernel<kD>
      <<<blocks, kWgmmaThreads<kD>, c.shared_bytes, stream>>>(params, maps);
  return cudaGetLastError();
}

}  // namespace

std::atomic<uint64_t> flash_attention_launches[kAttentionVariants];

cudaError_t flash_attention(const FlashAttentionParams& params, cudaStream_t stream) {
  if (params.a.T == 0 || params.a.K == 0) return cudaSuccess;
  if (!flash_attention_supported(params)) return cudaErrorInvalidValue;
  const FlashAttentionConfig c = flash_attention_config(params, capability());
  flash_attention_launches[static_cast<int>(c.variant)].fetch_add(1, std::memory_order_relaxed);
  if (c.variant == AttentionVariant::wgmma) {
    return c.head_dim == 64 ? launch_wgmma<64>(params, c, stream)
                            : launch_wgmma<128>(params, c, stream);
  }
  const dim3 grid(c.blocks, static_cast<unsigned>(params.a.K));
  return with_flash_attention_kernel(params.a.dtype, c, [&]<typename T, int kD>() {
    return launch(flash_attention_kernel<T, kD>, grid, kAttentionThreads, c.shared_bytes, params,
                  stream);
  });
}

}  // namespace ivr::cuda
