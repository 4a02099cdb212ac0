#include "kernels/cuda/launchers.h"
#include "kernels/cuda/moe_route.cuh"

namespace ivr::cuda {
namespace {

constexpr int kWholeThreads = kRouteWarps * kWarpSize;
constexpr int kTokenThreads = kRouteTokenWarps * kWarpSize;

__global__ void __launch_bounds__(kWholeThreads)
    moe_route_whole_kernel(const __grid_constant__ MoeRouteParams params) {
  moe_route_whole_block(params);
}

__global__ void __launch_bounds__(kTokenThreads)
    moe_route_tokens_kernel(const __grid_constant__ MoeRouteParams params) {
  moe_route_tokens_block(params);
}

__global__ void __launch_bounds__(kWholeThreads)
    moe_route_experts_kernel(const __grid_constant__ MoeRouteParams params) {
  moe_route_experts_block(params);
}

}  // namespace

cudaError_t moe_route(const MoeRouteParams& params, cudaStream_t stream) {
  if (!moe_route_supported(params)) return cudaErrorInvalidValue;
  const MoeRouteConfig c = moe_route_config(params);
  if (c.whole) {
    moe_route_whole_kernel<<<1, kWholeThreads, 0, stream>>>(params);
    return cudaGetLastError();
  }
  moe_route_tokens_kernel<<<c.token_blocks, kTokenThreads, 0, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  moe_route_experts_kernel<<<c.expert_blocks, kWholeThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace ivr::cuda
