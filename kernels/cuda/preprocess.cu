#include "kernels/cuda/launchers.h"
#include "kernels/cuda/preprocess.cuh"

namespace ivr::cuda {
namespace {

template <typename T, bool kAlongY, bool kLast, bool kAligned>
__global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_kernel(const __grid_constant__ PreprocessParams params,
                      const __grid_constant__ PreprocessTarget target,
                      const __grid_constant__ PreprocessPass pass) {
  preprocess_block<T, kAlongY, kLast, kAligned>(params, target, pass);
}

}  // namespace

cudaError_t preprocess(const PreprocessParams& params, cudaStream_t stream) {
  if (!preprocess_supported(params)) return cudaErrorInvalidValue;
  for (int64_t i = 0; i < 2 * params.n_targets; ++i) {
    const PreprocessTarget& target = params.targets[i / 2];
    const PreprocessPass pass = preprocess_pass(params, target, i % 2 == 1);
    const auto blocks =
        static_cast<unsigned>((pass.threads + kPreprocessThreads - 1) / kPreprocessThreads);
    with_preprocess_kernel(params.dtype, pass,
                           [&]<typename T, bool kAlongY, bool kLast, bool kAligned>() {
                             preprocess_kernel<T, kAlongY, kLast, kAligned>
                                 <<<blocks, kPreprocessThreads, 0, stream>>>(params, target, pass);
                           });
  }
  return cudaGetLastError();
}

}  // namespace ivr::cuda
