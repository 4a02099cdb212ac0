// The matrix products of Hopper as the host sees them; launchers like those of launchers.h.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "kernels/cuda/gemm.h"

namespace ivr::cuda {

// Whether this build has any.
bool has_gemms();

// The one that `linear` takes for a call on the current device; none where it has other kernels. A
// SwiGLU runs on these alone.
std::optional<GemmConfig> gemm_on_device(const LinearParams& params);

// One of them, whose unit defines it; on `multiprocessors` multiprocessors.
template <GemmEpilogue kEpilogue, int kN>
cudaError_t launch_gemm(const LinearParams& params, int multiprocessors, cudaStream_t stream);

// How often each was launched, in the order of kGemms.
extern std::atomic<uint64_t> gemm_launches[std::size(kGemms)];

}  // namespace ivr::cuda
