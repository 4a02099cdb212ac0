// rms_norm: y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension, statistics in fp32.
//
// One contract serves four uses, told apart by strides alone.
//
// plain: H = 1.
// residual: h = round(x + residual) is written to residual_out, then normalised.
// per-head: x [T, H, D] inside a packed qkv row, weight [D] (q_norm and k_norm of Qwen3).
// full-width: H = 1, C = heads * D, rows strided inside a packed qkv row (InternViT-6B).
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

struct RmsNormParams {
  const void* x;         // [T, H, C], C contiguous
  const void* residual;  // [T, H, C] or null
  const void* weight;    // [C] contiguous, same dtype as x
  void* y;               // [T, H, C]; may be x
  void* residual_out;    // [T, H, C] or null exactly when residual is null; may be residual
  int64_t T, H, C;
  // Strides in elements of (t, h).
  int64_t x_t, x_h;
  int64_t residual_t, residual_h;
  int64_t y_t, y_h;
  int64_t residual_out_t, residual_out_h;
  float eps;
  // false: round x * rsqrt(..) to the dtype, then multiply by weight (Llama, Qwen, InternViT)
  // true:  multiply in fp32, round once                              (GPT-OSS)
  bool weight_in_fp32;
  DType dtype;  // f32 or bf16
};

// Rows [begin, end) of the T * H rows, row = t * H + h.
IVR_CPU_KERNEL(rms_norm, const RmsNormParams& p, int64_t begin, int64_t end)

}  // namespace ivr
