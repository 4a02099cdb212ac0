// How a kernel is launched whose dynamic shared memory may be more than it has at once.
#pragma once

#include "kernels/cuda/launchers.h"

namespace ivr::cuda {

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes,
                   const Params& params, cudaStream_t stream) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace ivr::cuda
