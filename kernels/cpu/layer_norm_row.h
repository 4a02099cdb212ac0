// The LayerNorm of one row, shared by layer_norm and pixel_unshuffle_norm.
#pragma once

#include <math.h>

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

inline int64_t lanes_left(int64_t C, int64_t c) { return C - c < kLanes ? C - c : kLanes; }

// Sum of x, or of (x - mean)^2. Four chains hide the latency of the additions.
template <bool kSquares, class T>
float row_sum(const T* x, int64_t C, float mean) {
  F s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  const F m = set(mean);
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const F v = load(x + c + i * kLanes);
      s[i] = kSquares ? fma(v - m, v - m, s[i]) : s[i] + v;
    }
  }
  float tail = 0.0f;
  for (; c + kLanes <= C; c += kLanes) {
    const F v = load(x + c);
    s[0] = kSquares ? fma(v - m, v - m, s[0]) : s[0] + v;
  }
  for (; c < C; ++c) {
    const float v = to_float(x[c]);
    tail = kSquares ? fma1(v - mean, v - mean, tail) : tail + v;
  }
  return sum((s[0] + s[1]) + (s[2] + s[3])) + tail;
}

// y may be x.
template <class T>
void layer_norm_row(const T* x, const T* weight, const T* bias, T* y, int64_t C, float eps) {
  const float n = static_cast<float>(C);
  const float mean = row_sum<false>(x, C, 0.0f) / n;
  const float variance = row_sum<true>(x, C, mean) / n;
  const F m = set(mean), r = set(1.0f / sqrtf(variance + eps));
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t k = lanes_left(C, c);
    store_n(y + c, fma((load_n(x + c, k) - m) * r, load_n(weight + c, k), load_n(bias + c, k)), k);
  }
}

}  // namespace
}  // namespace ivr
