#include "kernels/cuda/layer_norm.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_layer_norm(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const LayerNormParams*>(params);
  if (p.T == 0 || p.C == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  allow_rows(machine, Access::read, "x", p.x, p.T, 1, p.C * size, p.x_t * size, 0);
  allow_rows(machine, Access::write, "y", p.y, p.T, 1, p.C * size, p.y_t * size, 0);
  machine.allow_read(p.weight, p.C * size, "weight");
  machine.allow_read(p.bias, p.C * size, "bias");

  const cuda::RowConfig c = cuda::layer_norm_config(p);
  bool clean = false;
  cuda::with_row_kernel(p.dtype, c, [&]<typename T, int kVectors, bool kAligned>() {
    clean =
        launch_rows(machine, c, config, [&p] { cuda::layer_norm_block<T, kVectors, kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
