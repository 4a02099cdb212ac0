#include "kernels/cuda/pixel_unshuffle_mlp.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_pixel_unshuffle_norm(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const PixelUnshuffleParams*>(params);
  if (p.t == 0 || p.C == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const int64_t width = cuda::pixel_unshuffle_width(p) * size;
  allow_rows(machine, Access::read, "x", p.x, p.t, p.h * p.w, p.C * size, p.x_t * size,
             p.x_cell * size);
  allow_rows(machine, Access::write, "y", p.y, cuda::pixel_unshuffle_rows(p), 1, width,
             p.y_row * size, 0);
  machine.allow_read(p.weight, width, "weight");
  machine.allow_read(p.bias, width, "bias");

  const cuda::RowConfig c = cuda::pixel_unshuffle_config(p);
  bool clean = false;
  cuda::with_row_kernel(p.dtype, c, [&]<typename T, int kVectors, bool kAligned>() {
    clean = launch_rows(machine, c, config,
                        [&p] { cuda::pixel_unshuffle_block<T, kVectors, kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
