// grouped_linear: rows sorted by expert, every expert's rows times its own weight:
// out[m] = x[rows[m]] W_e^T + bias_e for offsets[e] <= m < offsets[e + 1].
//
// Each expert's product is the one of kernels/linear.h, weights and steps alike: a row has the bits
// that linear gives it with that expert's weight, whatever else is in the call. On the CPU the
// steps of all experts run as one list of chunks; on CUDA a block looks up which expert's rows are
// its own (kernels/cuda/grouped_linear.cuh), and its bits are those of linear's kernels there, not
// those of Hopper's matrix products, which know no experts.
//
// grouped_gated_linear is the same with a gate behind every product, on the CPU only.
#pragma once

#include "kernels/linear.h"

namespace ivr {

struct GroupedLinearParams {
  const void* x;        // [R, K]
  const int32_t* rows;  // [M]: rows of x, or null: row m is x[m]
  const void* weight;   // the E experts' weights, packed, one behind the other; on CUDA [E, N, K]
  const void* bias;     // [E, N] or null
  const int32_t* offsets;  // [E + 1]
  void* out;               // [M, N]; of gated products [M, N / 2]
  int64_t R, M, N, K, E;
  int64_t x_r, bias_e, out_m;  // row strides in elements
  Activation activation;       // none or a gate
  DType dtype;                 // f32 or bf16: x, bias and out
  WeightFormat format;         // of weight: dtype's, int8 or int4; on CUDA dtype's
  bool decode;                 // CUDA: the kernel for few rows, whatever M is
};

}  // namespace ivr
