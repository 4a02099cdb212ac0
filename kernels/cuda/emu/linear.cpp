#include "kernels/cuda/linear.cuh"

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {

bool run_linear(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const LinearParams*>(params);
  if (p.M == 0 || p.N == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const int64_t out_size = static_cast<int64_t>(size_of(p.out_dtype));
  const auto rows = [&](Access access, const char* name, const void* base, int64_t count,
                        int64_t bytes, int64_t stride) {
    allow_rows(machine, access, name, base, count, 1, bytes, stride, 0);
  };
  rows(Access::read, "x", p.x, p.M, p.K * size, p.x_m * size);
  rows(Access::read, "weight", p.weight, p.N, p.K * size, p.K * size);
  rows(Access::read, "bias", p.bias, 1, p.N * size, 0);
  rows(Access::read, "scale", p.scale, 1, p.N * size, 0);
  rows(Access::read, "residual", p.residual, p.M, p.N * out_size, p.residual_m * out_size);
  rows(Access::write, "out", p.out, p.M, p.N * out_size, p.out_m * out_size);

  const cuda::LinearConfig c = cuda::linear_config(p);
  char text[128];
  cuda::format(c, text, sizeof(text));
  config = text;
  const Dim3 grid{c.blocks_n, c.blocks_m};
  bool clean = false;
  cuda::with_linear_kernel(c, [&]<cuda::LinearKernel kKernel, int kM, int kN, bool kAligned>() {
    clean = machine.launch(grid, {static_cast<unsigned>(c.threads)}, c.shared_bytes,
                           [&p] { cuda::linear_block<kKernel, kM, kN, kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
