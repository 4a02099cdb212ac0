// gated_activation: x [T, 2I] holds gate and up side by side, y [T, I].
//   silu      y = round(silu(gate)) * up
//   gpt_oss   gate = min(gate, 7), up = clip(up, -7, 7): y = gate * sigmoid(1.702 gate) * (up + 1),
//             rounded once
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

enum class Gate : int32_t { silu = 0, gpt_oss = 1 };

struct GatedActivationParams {
  const void* x;  // [T, 2I], contiguous in 2I
  void* y;        // [T, I], contiguous in I; may be the first half of x
  int64_t T, I;
  int64_t x_t, y_t;  // row strides in elements
  Gate gate;
  DType dtype;  // f32 or bf16
};

// Rows [begin, end).
IVR_CPU_KERNEL(gated_activation, const GatedActivationParams& p, int64_t begin, int64_t end)

}  // namespace ivr
