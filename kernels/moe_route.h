// moe_route: the experts of every token, and the order in which experts take their tokens.
//
// A row's experts are its k largest logits, the lower id first among equals; NaN counts as the
// largest, so that a row that holds one has NaN weights and no other row notices. weights is the
// softmax over the k chosen (normalize: Qwen3-MoE with norm_topk_prob, GPT-OSS) or over all E, in
// fp32. Assignments (t, j) are then sorted by expert, those of one expert by t.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

struct MoeRouteParams {
  const void* logits;  // [T, E]
  int32_t* ids;        // [T, k]: experts, the largest logit first
  float* weights;      // [T, k]
  int32_t* tokens;     // [T * k]: the token at each sorted place
  int32_t* places;     // [T, k]: the sorted place of each assignment
  int32_t* offsets;    // [E + 1]: expert e has the places offsets[e] .. offsets[e + 1]
  int64_t T, E, k;
  int64_t logits_t, ids_t, weights_t, places_t;  // row strides in elements
  bool normalize;
  DType dtype;  // f32 or bf16: logits
};

// ids and weights of rows [begin, end). The sorting is the host's; on CUDA it is the kernel's.
IVR_CPU_KERNEL(moe_route, const MoeRouteParams& p, int64_t begin, int64_t end)

}  // namespace ivr
