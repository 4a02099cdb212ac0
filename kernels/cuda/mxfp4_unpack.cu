#include "kernels/cuda/launchers.h"
#include "kernels/cuda/mxfp4_unpack.cuh"

namespace ivr::cuda {
namespace {

template <bool kAligned>
__global__ void __launch_bounds__(kMxfp4Threads)
    mxfp4_unpack_kernel(const __grid_constant__ Mxfp4Params params) {
  mxfp4_unpack_block<kAligned>(params);
}

}  // namespace

cudaError_t mxfp4_unpack(const Mxfp4Params& params, cudaStream_t stream) {
  if (params.B == 0) return cudaSuccess;
  if (!mxfp4_unpack_supported(params)) return cudaErrorInvalidValue;
  const Mxfp4Config c = mxfp4_unpack_config(params);
  with_mxfp4_kernel(c, [&]<bool kAligned>() {
    mxfp4_unpack_kernel<kAligned>
        <<<static_cast<unsigned>(c.blocks), kMxfp4Threads, 0, stream>>>(params);
  });
  return cudaGetLastError();
}

}  // namespace ivr::cuda
