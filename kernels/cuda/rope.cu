#include "kernels/cuda/launchers.h"
#include "kernels/cuda/rope.cuh"

namespace ivr::cuda {
namespace {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRopeMaxThreads)
    rope_kernel(const __grid_constant__ RopeParams params) {
  rope_block<T, kAligned>(params);
}

}  // namespace

cudaError_t rope(const RopeParams& params, cudaStream_t stream) {
  if (params.T == 0 || params.D == 0) return cudaSuccess;
  if (!rope_supported(params)) return cudaErrorInvalidValue;
  const RopeConfig c = rope_config(params);
  with_element(params.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    rope_kernel<T, kAligned><<<static_cast<unsigned>(params.T), c.threads, 0, stream>>>(params);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
