#include "kernels/cuda/launch.cuh"
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
  const dim3 splits(grid.x, grid.y, c.splits);
  const cudaError_t error =
      launch(split_attention_kernel<kD>, splits, kAttentionThreads, c.shared_bytes, params, stream);
  if (error != cudaSuccess || c.splits == 1) return error;
  merge_attention_kernel<kD>
      <<<grid, kAttentionThreads, 0, stream>>>(params, static_cast<int>(c.splits));
  return cudaGetLastError();
}

}  // namespace

cudaError_t paged_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  if (params.a.T == 0 || params.a.K == 0) return cudaSuccess;
  if (!paged_attention_supported(params)) return cudaErrorInvalidValue;
  const PagedAttentionConfig c = paged_attention_config(params);
  const dim3 grid(c.blocks, static_cast<unsigned>(params.a.K));
  return with_paged_attention_kernel(params.a.dtype, c, [&]<typename T, int kD>() {
    if constexpr (kD != 0) {
      if (c.splits > 0) return decode<kD>(params, c, grid, stream);
    }
    return launch(paged_attention_kernel<T, kD>, grid, kAttentionThreads, c.shared_bytes, params,
                  stream);
  });
}

int64_t paged_attention_workspace(const PagedAttentionParams& params) {
  return paged_attention_workspace(params.a, params.max_pages << params.page_shift);
}

}  // namespace ivr::cuda
