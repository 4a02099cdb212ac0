// What follows a product, for a block of rows of one panel: out = residual + scale * act(c + bias),
// or the gate of gate and up.
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
void finish_gated(const LinearParams& p, const float* c, int64_t c_m, int64_t m0, int64_t rows,
                  int64_t n0) {
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t n = n0 / 2;
  for (int64_t j = 0; j < kGateColumns; j += kLanes) {
    const F gate_bias = bias ? load(bias + n + j) : set(0.0f);
    const F up_bias = bias ? load(bias + p.N / 2 + n + j) : set(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      F gate = load(c + i * c_m + j), up = load(c + i * c_m + kGateColumns + j);
      if (bias) {
        gate = gate + gate_bias;
        up = up + up_bias;
      }
      const F y = p.activation == Activation::swiglu ? silu<kShort<Out>>(gate) * up
                                                     : gpt_oss_gate<kShort<Out>>(gate, up);
      store(static_cast<Out*>(p.out) + (m0 + i) * p.out_m + n + j, y);
    }
  }
}

template <class T, class Out>
void finish(const LinearParams& p, const float* c, int64_t c_m, int64_t m0, int64_t rows,
            int64_t n0) {
  if (is_gated(p.activation)) return finish_gated<T, Out>(p, c, c_m, m0, rows, n0);
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
