#include "kernels/cuda/gated_activation.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_gated_activation(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const GatedActivationParams*>(params);
  if (p.T == 0 || p.I == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  // The halves are a range each: one may not be entered from the other.
  allow_rows(machine, Access::read, "x", p.x, p.T, 2, p.I * size, p.x_t * size, p.I * size);
  allow_rows(machine, Access::write, "y", p.y, p.T, 1, p.I * size, p.y_t * size, 0);

  const cuda::ChunkConfig c = cuda::gated_activation_config(p);
  bool clean = false;
  cuda::with_element(p.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    clean = launch_chunks(machine, c, config,
                          [&] { cuda::gated_activation_block<T, kAligned>(p, c.chunks); });
  });
  return clean;
}

}  // namespace ivr::emu
