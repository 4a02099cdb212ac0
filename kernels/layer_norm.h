// layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, in
// fp32 and rounded once; the variance is taken around the mean in a second pass.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

struct LayerNormParams {
  const void* x;       // [T, C], C contiguous
  const void* weight;  // [C] contiguous, same dtype as x
  const void* bias;    // [C] contiguous, same dtype as x
  void* y;             // [T, C]; may be x
  int64_t T, C;
  int64_t x_t, y_t;  // row strides in elements
  float eps;
  DType dtype;  // f32 or bf16
};

// Rows [begin, end).
IVR_CPU_KERNEL(layer_norm, const LayerNormParams& p, int64_t begin, int64_t end)

}  // namespace ivr
