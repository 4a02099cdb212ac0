// The host side of CUDA kernels: device checks and launches on torch's current stream.
#pragma once

#include "csrc/check.h"

#if defined(IVR_CUDA)
#include "kernels/cuda/launchers.h"
#endif

namespace ivr {

// For ops without a CUDA kernel: refuses tensors on a CUDA device.
inline void require_cpu(const Checker& check, const Tensor& t) {
#if defined(IVR_CUDA)
  check.require(t.device == Device::cpu,
                "tensors are on a CUDA device: this op has no CUDA kernel");
#else
  check.require(t.device == Device::cpu,
                "tensors are on a CUDA device: this build has no CUDA kernels");
#endif
}

#if defined(IVR_CUDA)
#define IVR_CUDA_KERNEL(op) (&cuda::op)

// Calls launch(params, stream) for tensors on t's device. Throws where the launch was refused.
template <class Launch, class Params>
void launch_cuda(const Checker& check, Launch launch, const Params& params, const Tensor& t) {
  const auto stream = static_cast<cudaStream_t>(current_stream(t.device_index));
  int device = t.device_index;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device != t.device_index) error = cudaSetDevice(t.device_index);
  if (error == cudaSuccess) error = launch(params, stream);
  if (device != t.device_index) cudaSetDevice(device);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what was refused here is not to be found behind the next launch
  check.fail(std::string("CUDA: ") + cudaGetErrorString(error));
}
#else
#define IVR_CUDA_KERNEL(op) nullptr
#endif

// For tensors on a CUDA device: launches IVR_CUDA_KERNEL(op) and returns true, or throws. For
// tensors on the CPU: false.
template <class Launch, class Params>
bool ran_on_cuda(const Checker& check, [[maybe_unused]] Launch launch,
                 [[maybe_unused]] const Params& params, const Tensor& t) {
  if (t.device == Device::cpu) return false;
#if defined(IVR_CUDA)
  launch_cuda(check, launch, params, t);
#else
  require_cpu(check, t);
#endif
  return true;
}

}  // namespace ivr
