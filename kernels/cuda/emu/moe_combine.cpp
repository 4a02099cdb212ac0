#include "kernels/cuda/moe_combine.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_moe_combine(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const MoeCombineParams*>(params);
  if (p.T == 0 || p.N == 0) {
    config = "empty";
    return true;
  }
  const auto rows = [&](Access access, const char* name, const void* base, int64_t count,
                        int64_t bytes, int64_t stride) {
    allow_rows(machine, access, name, base, count, 1, bytes, stride, 0);
  };
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  rows(Access::read, "x", p.x, p.M, p.N * size, p.x_m * size);
  rows(Access::read, "weights", p.weights, p.T, p.k * 4, p.weights_t * 4);
  rows(Access::read, "places", p.places, p.T, p.k * 4, p.places_t * 4);
  rows(Access::read, "residual", p.residual, p.T, p.N * size, p.residual_t * size);
  rows(Access::write, "out", p.out, p.T, p.N * size, p.out_t * size);

  const cuda::ChunkConfig c = cuda::moe_combine_config(p);
  bool clean = false;
  cuda::with_element(p.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    clean = launch_chunks(machine, c, config,
                          [&] { cuda::moe_combine_block<T, kAligned>(p, c.chunks); });
  });
  return clean;
}

}  // namespace ivr::emu
