#include "kernels/cuda/embed_scatter.cuh"
#include "kernels/cuda/launchers.h"

namespace ivr::cuda {
namespace {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kChunkThreads)
    embed_scatter_kernel(const __grid_constant__ EmbedScatterParams params, unsigned chunks) {
  embed_scatter_block<T, kAligned>(params, chunks);
}

}  // namespace

cudaError_t embed_scatter(const EmbedScatterParams& params, cudaStream_t stream) {
  if (params.T == 0 || params.C == 0) return cudaSuccess;
  if (!embed_scatter_supported(params)) return cudaErrorInvalidValue;
  const ChunkConfig c = embed_scatter_config(params);
  with_element(params.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    embed_scatter_kernel<T, kAligned>
        <<<static_cast<unsigned>(c.blocks), kChunkThreads, 0, stream>>>(params, c.chunks);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
