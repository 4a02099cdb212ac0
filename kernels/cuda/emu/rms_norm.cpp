#include "kernels/cuda/rms_norm.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_rms_norm(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const RmsNormParams*>(params);
  if (p.T == 0 || p.H == 0 || p.C == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const auto rows = [&](Access access, const char* name, const void* base, int64_t t, int64_t h) {
    allow_rows(machine, access, name, base, p.T, p.H, p.C * size, t * size, h * size);
  };
  rows(Access::read, "x", p.x, p.x_t, p.x_h);
  rows(Access::read, "residual", p.residual, p.residual_t, p.residual_h);
  rows(Access::read, "residual_out", p.residual_out, p.residual_out_t, p.residual_out_h);
  rows(Access::write, "residual_out", p.residual_out, p.residual_out_t, p.residual_out_h);
  rows(Access::write, "y", p.y, p.y_t, p.y_h);
  machine.allow_read(p.weight, p.C * size, "weight");

  const cuda::RowConfig c = cuda::rms_norm_config(p);
  bool clean = false;
  cuda::with_row_kernel(p.dtype, c, [&]<typename T, int kVectors, bool kAligned>() {
    clean =
        launch_rows(machine, c, config, [&p] { cuda::rms_norm_block<T, kVectors, kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
