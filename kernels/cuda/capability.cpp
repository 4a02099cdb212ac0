#include <atomic>

#include "kernels/cuda/launchers.h"

namespace ivr::cuda {
namespace {

#if defined(IVR_SM90A)
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

std::atomic<bool> mma_only{false};

}  // namespace

int capability() {
  int device = 0, major = 0, minor = 0;
  const bool hopper =
      kHopperBuilt && !mma_only.load(std::memory_order_relaxed) &&
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
      major == 9 && minor == 0;
  return hopper ? 90 : 80;
}

void force_mma(bool on) { mma_only = on; }

}  // namespace ivr::cuda
