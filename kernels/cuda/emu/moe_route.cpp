#include "kernels/cuda/moe_route.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_moe_route(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const MoeRouteParams*>(params);
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const auto rows = [&](const char* name, const void* base, int64_t bytes, int64_t stride) {
    allow_rows(machine, Access::read, name, base, p.T, 1, bytes, stride, 0);
  };
  const auto own_rows = [&](const char* name, const void* base, int64_t stride) {
    rows(name, base, p.k * 4, stride);
    allow_rows(machine, Access::write, name, base, p.T, 1, p.k * 4, stride, 0);
  };
  rows("logits", p.logits, p.E * size, p.logits_t * size);
  own_rows("ids", p.ids, p.ids_t * 4);
  own_rows("weights", p.weights, p.weights_t * 4);
  allow_rows(machine, Access::write, "places", p.places, p.T, 1, p.k * 4, p.places_t * 4, 0);
  machine.allow_write(p.tokens, p.T * p.k * 4, "tokens");
  machine.allow_write(p.offsets, (p.E + 1) * 4, "offsets");

  const cuda::MoeRouteConfig c = cuda::moe_route_config(p);
  config = words(c);
  const Dim3 sorters{cuda::kRouteWarps * cuda::kWarpSize};
  if (c.whole) return machine.launch({1}, sorters, 0, [&p] { cuda::moe_route_whole_block(p); });
  return machine.launch({c.token_blocks}, {cuda::kRouteTokenWarps * cuda::kWarpSize}, 0, [&p] {
    cuda::moe_route_tokens_block(p);
  }) && machine.launch({c.expert_blocks}, sorters, 0, [&p] { cuda::moe_route_experts_block(p); });
}

}  // namespace ivr::emu
