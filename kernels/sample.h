// sample: the next token of each row of logits.
//
// In this order: repetition penalty, temperature, top-k, top-p, min-p, then Gumbel-max: the kept
// token with the largest logit / temperature + g, g = -log(-log(u)), u from Philox4x32-10 with key
// `seed` and counter (token / 4, index), where index counts the tokens of the answer. So a token
// depends on its row, its seed and its index alone. Temperature 0 is argmax, the lowest id winning
// a tie.
//
// On the CPU the caller has checked every parameter and id. On a GPU nobody has: a row with one out
// of range answers -1.
//
// Filters are thresholds on the value: tokens that tie with the last kept one are kept too.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

struct SampleParams {
  const float* logits;              // [B, V], rows logits_b elements apart
  const float* temperature;         // [B] or null (0)
  const int32_t* top_k;             // [B] or null; 0 keeps all
  const float* top_p;               // [B] or null (1)
  const float* min_p;               // [B] or null (0)
  const float* repetition_penalty;  // [B] or null (1)
  const int64_t* history;           // tokens that the penalty applies to, or null
  const int32_t* cu_history;        // [B + 1], row b owns history[cu[b]] .. history[cu[b + 1]]
  const int64_t* seed;              // [B] or null (0)
  const int64_t* index;             // [B] or null (0)
  float* workspace;                 // [B, V], rows workspace_b elements apart, padded to 16 bytes
  int64_t* out;                     // [B]; -1 where a logit is NaN or +inf, or none is finite
  int64_t B, V;
  int64_t L;  // length of history
  int64_t logits_b, workspace_b;
};

// Rows [begin, end).
IVR_CPU_KERNEL(sample, const SampleParams& p, int64_t begin, int64_t end)

}  // namespace ivr
