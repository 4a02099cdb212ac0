// What the ops with a product share: its steps and how a call's memory is bounded.
#pragma once

#include "csrc/check.h"
#include "kernels/gated_activation.h"
#include "kernels/linear.h"

namespace ivr {

// x is prepared for at most this many bytes at a time, so that a call's memory does not grow with
// M.
constexpr int64_t kWorkspaceBytes = 24 << 20;
// A multiple of every instruction set's row group.
constexpr int64_t kRowMultiple = 96;
// Below this much work per product a second thread does not pay.
constexpr int64_t kSerialFlops = 1 << 17;
constexpr int64_t kPrepareElements = 16384;
// CUDA, where the caller does not say: up to so many rows are a decode step.
constexpr int64_t kDecodeRows = 16;

// The steps of a product of x in this dtype and weights of this format, on the current instruction
// set.
LinearSteps linear_steps(DType dtype, WeightFormat format);

// Checks x [M, K] and a weight [N, K] and describes their product, without an epilogue. The weight
// is held as its format and the device say, or is a table of pointers to its rows.
LinearParams product_of(Checker& check, const Tensor& x, const Tensor& weight, int64_t N, int64_t K,
                        WeightFormat format);

// The epilogue with this gate.
constexpr Activation epilogue_of(Gate gate) {
  return gate == Gate::silu ? Activation::swiglu : Activation::swiglu_gpt_oss;
}

// Runs a product on the CPU.
void run_on_cpu(const LinearParams& p);

}  // namespace ivr
