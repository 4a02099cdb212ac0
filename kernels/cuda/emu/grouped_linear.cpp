#include "kernels/cuda/grouped_linear.cuh"

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {

bool run_grouped_linear(Machine& machine, const void* params, std::string& config) {
  const auto& g = *static_cast<const GroupedLinearParams*>(params);
  if (g.M == 0 || g.N == 0 || g.E == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(g.dtype));
  const auto rows = [&](Access access, const char* name, const void* base, int64_t count,
                        int64_t elements, int64_t stride) {
    allow_rows(machine, access, name, base, count, 1, elements * size, stride * size, 0);
  };
  rows(Access::read, "x", g.x, g.R, g.K, g.x_r);
  rows(Access::read, "weight", g.weight, g.E * g.N, g.K, g.K);
  rows(Access::read, "bias", g.bias, g.E, g.N, g.bias_e);
  rows(Access::write, "out", g.out, g.M, g.N, g.out_m);
  machine.allow_read(g.offsets, (g.E + 1) * 4, "offsets");
  if (g.rows != nullptr) machine.allow_read(g.rows, g.M * 4, "rows");

  const cuda::LinearConfig c = cuda::grouped_linear_config(g);
  char text[128];
  cuda::format(c, text, sizeof(text));
  config = text;
  const Dim3 grid{c.blocks_n, c.blocks_m};
  bool clean = false;
  cuda::with_linear_kernel(c, [&]<cuda::LinearKernel kKernel, int kM, int kN, bool kAligned>() {
    clean = machine.launch(grid, {static_cast<unsigned>(c.threads)}, c.shared_bytes,
                           [&g] { cuda::grouped_linear_block<kKernel, kM, kN, kAligned>(g); });
  });
  return clean;
}

}  // namespace ivr::emu
