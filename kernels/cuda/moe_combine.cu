#include "kernels/cuda/launchers.h"
#include "kernels/cuda/moe_combine.cuh"

namespace ivr::cuda {
namespace {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kChunkThreads)
    moe_combine_kernel(const __grid_constant__ MoeCombineParams params, unsigned chunks) {
  moe_combine_block<T, kAligned>(params, chunks);
}

}  // namespace

cudaError_t moe_combine(const MoeCombineParams& params, cudaStream_t stream) {
  if (params.T == 0 || params.N == 0) return cudaSuccess;
  if (!moe_combine_supported(params)) return cudaErrorInvalidValue;
  const ChunkConfig c = moe_combine_config(params);
  with_element(params.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    moe_combine_kernel<T, kAligned>
        <<<static_cast<unsigned>(c.blocks), kChunkThreads, 0, stream>>>(params, c.chunks);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
