#include "kernels/cuda/launchers.h"
#include "kernels/cuda/sample.cuh"

namespace ivr::cuda {
namespace {

template <bool kAligned>
__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(const __grid_constant__ SampleParams params) {
  sample_block<kAligned>(params);
}

}  // namespace

cudaError_t sample(const SampleParams& params, cudaStream_t stream) {
  if (params.B == 0) return cudaSuccess;
  if (!sample_supported(params)) return cudaErrorInvalidValue;
  with_sample_kernel(sample_config(params), [&]<bool kAligned>() {
    sample_kernel<kAligned><<<static_cast<unsigned>(params.B), kSampleThreads, 0, stream>>>(params);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
