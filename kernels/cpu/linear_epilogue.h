// What follows a product: out = residual + scale * act(c + bias), for a block of rows of one panel.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

template <class Out>
inline F activate(F v, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return gelu<kShort<Out>>(v);
    case Activation::silu:
      return silu<kShort<Out>>(v);
    default:
      return v;
  }
}

// c: fp32 products [rows, 32], row stride c_m; rows stand at m0, columns at n0.
template <class T, class Out>
void finish(const LinearParams& p, const float* c, int64_t c_m, int64_t m0, int64_t rows,
            int64_t n0) {
  const T* bias = static_cast<const T*>(p.bias);
  const T* scale = static_cast<const T*>(p.scale);
  const int64_t columns = p.N - n0 < kPanelColumns ? p.N - n0 : kPanelColumns;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t n = columns - j < kLanes ? columns - j : kLanes;
    const F b = bias ? load_n(bias + n0 + j, n) : set(0.0f);
    const F s = scale ? load_n(scale + n0 + j, n) : set(1.0f);
    for (int64_t i = 0; i < rows; ++i) {
      F v = load(c + i * c_m + j);
      if (bias) v = v + b;
      v = activate<Out>(v, p.activation);
      if (scale) v = v * s;
      if (p.residual) {
        v = load_n(static_cast<const Out*>(p.residual) + (m0 + i) * p.residual_m + n0 + j, n) + v;
      }
      store_n(static_cast<Out*>(p.out) + (m0 + i) * p.out_m + n0 + j, v, n);
    }
  }
}

inline void finish(const LinearParams& p, const float* c, int64_t c_m, int64_t m0, int64_t rows,
                   int64_t n0) {
  if (p.dtype == DType::f32) {
    finish<float, float>(p, c, c_m, m0, rows, n0);
  } else if (p.out_dtype == DType::f32) {
    finish<bf16, float>(p, c, c_m, m0, rows, n0);
  } else {
    finish<bf16, bf16>(p, c, c_m, m0, rows, n0);
  }
}

}  // namespace
}  // namespace ivr
