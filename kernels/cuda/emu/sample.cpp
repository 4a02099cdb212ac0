#include "kernels/cuda/sample.cuh"

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {

bool run_sample(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const SampleParams*>(params);
  if (p.B == 0) {
    config = "empty";
    return true;
  }
  const int64_t row = p.workspace_b * 4;
  allow_rows(machine, Access::read, "logits", p.logits, p.B, 1, p.V * 4, p.logits_b * 4, 0);
  allow_rows(machine, Access::read, "workspace", p.workspace, p.B, 1, row, row, 0);
  allow_rows(machine, Access::write, "workspace", p.workspace, p.B, 1, row, row, 0);
  machine.allow_write(p.out, p.B * 8, "out");
  const auto parameter = [&](const void* values, int64_t bytes, const char* name) {
    if (values != nullptr) machine.allow_read(values, bytes, name);
  };
  parameter(p.temperature, p.B * 4, "temperature");
  parameter(p.top_k, p.B * 4, "top_k");
  parameter(p.top_p, p.B * 4, "top_p");
  parameter(p.min_p, p.B * 4, "min_p");
  parameter(p.repetition_penalty, p.B * 4, "repetition_penalty");
  parameter(p.history, p.L * 8, "history");
  parameter(p.cu_history, (p.B + 1) * 4, "cu_history");
  parameter(p.seed, p.B * 8, "seed");
  parameter(p.index, p.B * 8, "index");

  const cuda::SampleConfig c = cuda::sample_config(p);
  char text[64];
  cuda::format(c, p, text, sizeof(text));
  config = text;
  bool clean = false;
  cuda::with_sample_kernel(c, [&]<bool kAligned>() {
    clean = machine.launch({static_cast<unsigned>(p.B)}, {cuda::kSampleThreads}, 0,
                           [&p] { cuda::sample_block<kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
