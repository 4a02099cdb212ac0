#include "kernels/cuda/rms_norm.cuh"

#include "kernels/cuda/emu/ops.h"

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

  const cuda::RmsNormConfig c = cuda::rms_norm_config(p);
  char text[128];
  cuda::format(c, text, sizeof(text));
  config = text;
  const Dim3 block{static_cast<unsigned>(c.threads_per_row),
                   static_cast<unsigned>(c.rows_per_block)};
  bool clean = false;
  cuda::with_rms_norm_kernel(p.dtype, c, [&]<typename T, int kVectors, bool kAligned>() {
    clean = machine.launch({c.blocks}, block, 0,
                           [&p] { cuda::rms_norm_block<T, kVectors, kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
