#include "kernels/cuda/launchers.h"
#include "kernels/cuda/paged_attention.cuh"

namespace ivr::cuda {
namespace {

template <typename T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    paged_attention_kernel(const __grid_constant__ PagedAttentionParams params) {
  paged_attention_block<T, kD>(params);
}

template <int kD>
__global__ void __launch_bounds__(kAttentionThreads, 3)
    split_attention_kernel(const __grid_constant__ PagedAttentionParams params) {
  split_attention_block<kD>(params);
}

template <int kD>
__global__ void __launch_bounds__(kAttentionThreads)
    merge_attention_kernel(const __grid_constant__ PagedAttentionParams params, int splits) {
  merge_attention_block<kD>(params, splits);
}

template <int kD>
cudaError_t decode(const PagedAttentionParams& params, const PagedAttentionConfig& c, dim3 grid,
                   cudaStream_t stream) {
  const cudaError_t error = allow_shared_bytes(split_attention_kernel<kD>, c.shared_bytes);
  if (error != cudaSuccess) return error;
  const dim3 splits(grid.x, grid.y, c.splits);
  split_attention_kernel<kD><<<splits, kAttentionThreads, c.shared_bytes, stream>>>(params);
  if (c.splits > 1) {
    merge_attention_kernel<kD>
        <<<grid, kAttentionThreads, 0, stream>>>(params, static_cast<int>(c.splits));
  }
  return cudaGetLastError();
}

template <typename T, int kD>
cudaError_t prefill(const PagedAttentionParams& params, const PagedAttentionConfig& c, dim3 grid,
                    cudaStream_t stream) {
  const cudaError_t error = allow_shared_bytes(paged_attention_kernel<T, kD>, c.shared_bytes);
  if (error != cudaSuccess) return error;
  paged_attention_kernel<T, kD><<<grid, kAttentionThreads, c.shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t paged_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  if (params.a.T == 0 || params.a.K == 0) return cudaSuccess;
  if (!paged_attention_supported(params)) return cudaErrorInvalidValue;
  const PagedAttentionConfig c = paged_attention_config(params);
  const dim3 grid(c.blocks, static_cast<unsigned>(params.a.K));
  cudaError_t error = cudaSuccess;
  with_paged_attention_kernel(params.a.dtype, c, [&]<typename T, int kD>() {
    if constexpr (kD != 0) {
      if (c.splits > 0) {
        error = decode<kD>(params, c, grid, stream);
        return;
      }
    }
    error = prefill<T, kD>(params, c, grid, stream);
  });
  return error;
}

int64_t paged_attention_workspace(const PagedAttentionParams& params) {
  return paged_attention_workspace(params.a, params.max_pages << params.page_shift);
}

}  // namespace ivr::cuda
