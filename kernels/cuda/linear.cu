#include <array>
#include <utility>

#include "kernels/cuda/gemm_launchers.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.cuh"

namespace ivr::cuda {
namespace {

template <LinearKernel kKernel, int kM, int kN, bool kAligned>
__global__ void __launch_bounds__(256, 2)
    linear_kernel(const __grid_constant__ LinearParams params) {
  linear_block<kKernel, kM, kN, kAligned>(params);
}

#if defined(IVR_CUTLASS)

constexpr bool kHasGemms = true;
using GemmLauncher = cudaError_t (*)(const LinearParams&, int, cudaStream_t);

template <size_t... kIndex>
constexpr std::array<GemmLauncher, sizeof...(kIndex)> gemm_launchers(
    std::index_sequence<kIndex...>) {
  return {launch_gemm<kGemms[kIndex].epilogue, kGemms[kIndex].n>...};
}

cudaError_t run_gemm(const GemmConfig& config, const LinearParams& params, cudaStream_t stream) {
  static constexpr auto kLaunchers = gemm_launchers(std::make_index_sequence<std::size(kGemms)>());
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const size_t i = gemm_index(config);
  gemm_launches[i].fetch_add(1, std::memory_order_relaxed);
  return kLaunchers[i](params, multiprocessors, stream);
}

#else

constexpr bool kHasGemms = false;
cudaError_t run_gemm(const GemmConfig&, const LinearParams&, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

#endif

}  // namespace

std::atomic<uint64_t> gemm_launches[std::size(kGemms)];

bool has_gemms() { return kHasGemms; }

std::optional<GemmConfig> gemm_on_device(const LinearParams& params) {
  const std::optional<GemmConfig> config = gemm_config(params);
  return kHasGemms && config && capability() == 90 ? config : std::nullopt;
}

cudaError_t linear(const LinearParams& params, cudaStream_t stream) {
  if (params.M == 0 || params.N == 0) return cudaSuccess;
  if (const auto gemm = gemm_on_device(params)) return run_gemm(*gemm, params, stream);
  if (!linear_supported(params)) return cudaErrorInvalidValue;
  const LinearConfig c = linear_config(params);
  const dim3 grid(c.blocks_n, c.blocks_m);
  return with_linear_kernel(c, [&]<LinearKernel kKernel, int kM, int kN, bool kAligned>() {
    return launch(linear_kernel<kKernel, kM, kN, kAligned>, grid, c.threads, c.shared_bytes, params,
                  stream);
  });
}

}  // namespace ivr::cuda
