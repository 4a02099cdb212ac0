#include "kernels/cuda/flash_attention.cuh"

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {

void allow_attention(Machine& machine, const AttentionParams& a) {
  const int64_t size = static_cast<int64_t>(size_of(a.dtype)), H = a.K * a.group;
  allow_rows(machine, Access::read, "q", a.q, a.T, H, a.D * size, a.q_t * size, a.q_h * size);
  allow_rows(machine, Access::write, "out", a.out, a.T, H, a.D * size, a.out_t * size,
             a.out_h * size);
  machine.allow_read(a.cu_q, (a.B + 1) * 4, "cu_q");
  if (a.prefix != nullptr) machine.allow_read(a.prefix, a.B * 4, "prefix");
  if (a.sinks != nullptr) {
    machine.allow_read(a.sinks, H * static_cast<int64_t>(size_of(a.sinks_dtype)), "sinks");
  }
}

bool run_flash_attention(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const FlashAttentionParams*>(params);
  if (p.a.T == 0 || p.a.K == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.a.dtype));
  allow_attention(machine, p.a);
  machine.allow_read(p.cu_kv, (p.a.B + 1) * 4, "cu_kv");
  const int64_t keys = p.cu_kv[p.a.B];
  allow_rows(machine, Access::read, "k", p.k, keys, p.a.K, p.a.D * size, p.k_t * size,
             p.k_h * size);
  allow_rows(machine, Access::read, "v", p.v, keys, p.a.K, p.a.D * size, p.v_t * size,
             p.v_h * size);

  const cuda::FlashAttentionConfig c = cuda::flash_attention_config(p, machine.capability());
  char text[128];
  cuda::format(c, text, sizeof(text));
  config = text;
  const Dim3 grid{c.blocks, static_cast<unsigned>(p.a.K)};
  bool clean = false;
  if (c.variant == AttentionVariant::wgmma) {
    const auto maps = cuda::key_boxes(p);
    const auto run = [&]<int kD>() {
      clean = machine.launch({c.blocks * grid.y}, {cuda::kWgmmaThreads<kD>}, c.shared_bytes,
                             [&] { cuda::flash_attention_wgmma_block<kD>(p, maps); });
    };
    c.head_dim == 64 ? run.template operator()<64>() : run.template operator()<128>();
    return clean;
  }
  cuda::with_flash_attention_kernel(p.a.dtype, c, [&]<typename T, int kD>() {
    clean = machine.launch(grid, {cuda::kAttentionThreads}, c.shared_bytes,
                           [&p] { cuda::flash_attention_block<T, kD>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
