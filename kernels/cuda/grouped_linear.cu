#include "kernels/cuda/grouped_linear.cuh"
#include "kernels/cuda/launch.cuh"

namespace ivr::cuda {
namespace {

template <LinearKernel kKernel, int kM, int kN, bool kAligned>
__global__ void __launch_bounds__(256, 2)
    grouped_linear_kernel(const __grid_constant__ GroupedLinearParams params) {
  grouped_linear_block<kKernel, kM, kN, kAligned>(params);
}

}  // namespace

cudaError_t grouped_linear(const GroupedLinearParams& params, cudaStream_t stream) {
  if (params.M == 0 || params.N == 0 || params.E == 0) return cudaSuccess;
  if (!grouped_linear_supported(params)) return cudaErrorInvalidValue;
  const LinearConfig c = grouped_linear_config(params);
  const dim3 grid(c.blocks_n, c.blocks_m);
  return with_linear_kernel(c, [&]<LinearKernel kKernel, int kM, int kN, bool kAligned>() {
    return launch(grouped_linear_kernel<kKernel, kM, kN, kAligned>, grid, c.threads, c.shared_bytes,
                  params, stream);
  });
}

}  // namespace ivr::cuda
