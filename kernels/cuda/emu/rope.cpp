#include "kernels/cuda/rope.cuh"

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {

bool run_rope(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const RopeParams*>(params);
  if (p.T == 0 || p.D == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.dtype)), D = p.D * size;
  allow_rows(machine, Access::read, "q", p.q, p.T, p.H, D, p.q_t * size, p.q_h * size);
  allow_rows(machine, Access::read, "k", p.k, p.T, p.K, D, p.k_t * size, p.k_h * size);
  allow_rows(machine, Access::read, "v", p.v, p.T, p.K, D, p.v_t * size, p.v_h * size);
  allow_rows(machine, Access::write, "out", p.out, p.T, p.H, D, p.out_t * size, p.out_h * size);
  allow_rows(machine, Access::read, "inv_freq", p.inv_freq, p.B, 1, p.half * 4, p.inv_freq_b * 4,
             0);
  machine.allow_read(p.scale, p.B * 4, "scale");
  machine.allow_read(p.positions, p.T * 4, "positions");
  machine.allow_read(p.sequence, p.T * 4, "sequence");
  machine.allow_read(p.slots, p.T * 8, "slots");
  for (int64_t t = 0; t < p.T; ++t) {
    if (p.slots[t] < 0 || p.slots[t] >= p.places) continue;
    const int64_t page = p.slots[t] / p.P, offset = p.slots[t] % p.P;
    const auto row = [&](const char* name, void* cache, int64_t first, int64_t head) {
      allow_rows(machine, Access::write, name, static_cast<char*>(cache) + first * size, 1, p.K, D,
                 0, head * size);
    };
    row("k_cache", p.k_cache, page * p.k_page + offset * p.k_p, p.k_cache_h);
    row("v_cache", p.v_cache, page * p.v_page + offset * p.v_p, p.v_cache_h);
  }

  const cuda::RopeConfig c = cuda::rope_config(p);
  char text[128];
  cuda::format(c, p, text, sizeof(text));
  config = text;
  bool clean = false;
  cuda::with_element(p.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    clean = machine.launch({static_cast<unsigned>(p.T)}, {static_cast<unsigned>(c.threads)}, 0,
                           [&p] { cuda::rope_block<T, kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
