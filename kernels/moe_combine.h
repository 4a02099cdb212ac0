// moe_combine: out[t] = residual[t] + sum over j of weights[t, j] * x[places[t, j]].
//
// The sum is one chain of multiply-adds from zero over j = 0 .. k - 1 in fp32, rounded once: a
// token's bits depend on its own experts' results alone.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

struct MoeCombineParams {
  const void* x;          // [M, N]: experts' results, sorted by expert
  const float* weights;   // [T, k]
  const int32_t* places;  // [T, k]: rows of x
  const void* residual;   // [T, N] or null; may be out
  void* out;              // [T, N]
  int64_t T, M, N, k;
  int64_t x_m, weights_t, places_t, residual_t, out_t;  // row strides in elements
  DType dtype;                                          // f32 or bf16: x, residual and out
};

// Tokens [begin, end).
IVR_CPU_KERNEL(moe_combine, const MoeCombineParams& p, int64_t begin, int64_t end)

}  // namespace ivr
