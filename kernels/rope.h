// rope: rotates q and k by their positions (half-split pairs j, j + R/2) and appends k and v to the
// pages of the KV cache.
//
// On the CPU the caller has checked every sequence and slot. On a GPU nobody has: a token whose
// sequence is out of range is rotated to NaN, and a slot out of range is stored nowhere, so that
// its request, and no other, fails later.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

constexpr int64_t kRopeMaxDim = 1024;

struct RopeParams {
  const void* q;            // [T, H, D]
  const void* k;            // [T, K, D]
  const void* v;            // [T, K, D]
  const float* positions;   // [T]
  const float* inv_freq;    // [B, R/2]
  const float* scale;       // [B]: multiplies cos and sin
  const int32_t* sequence;  // [T]: row of inv_freq and scale
  const int64_t* slots;     // [T]: page * P + offset; negative: k and v are not stored
  void* k_cache;            // [pages, K, P, D]
  void* v_cache;            // [pages, K, P, D]
  void* out;                // [T, H, D]; may be q
  int64_t T, H, K, P, D, B;
  int64_t places;                        // pages * P
  int64_t half;                          // R/2; dimensions from R on are copied
  int64_t q_t, q_h, k_t, k_h, v_t, v_h;  // strides in elements
  int64_t inv_freq_b, out_t, out_h;
  int64_t k_page, k_cache_h, k_p, v_page, v_cache_h, v_p;
  DType dtype;  // f32 or bf16, of everything but the angles
};

// Tokens [begin, end).
IVR_CPU_KERNEL(rope, const RopeParams& p, int64_t begin, int64_t end)

}  // namespace ivr
