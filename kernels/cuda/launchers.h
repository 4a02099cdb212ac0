// The CUDA face of every op, as the host sees it. Launchers run on the current device, on the
// stream given, asynchronously; they neither allocate nor synchronise, and may be captured in a
// graph. Shapes are trusted; what a kernel cannot index returns cudaErrorInvalidValue.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/flash_attention.h"
#include "kernels/rms_norm.h"

namespace ivr::cuda {

cudaError_t flash_attention(const FlashAttentionParams& params, cudaStream_t stream);
cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream);

// Raises a kernel's limit of dynamic shared memory where it needs more than it may have at once:
// a property of the kernel, so that calling it under capture is allowed and changes nothing.
template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel* kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace ivr::cuda
