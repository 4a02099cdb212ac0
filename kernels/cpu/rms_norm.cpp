// rms_norm on the CPU. One thread per group of rows; a row is read twice (statistics, output), the
// second time from L1. Bytes moved: 2 * C * size (4 * C * size with a residual).
#include "kernels/rms_norm.h"

#include <math.h>

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

// Rounds to T and back, as a store to and a load from memory would.
inline float rounded(float x, const float*) { return x; }
inline float rounded(float x, const bf16*) { return to_float(to_bf16(x)); }

template <class T>
inline F rounded(F x, const T*) {
  T t[kLanes];
  store(t, x);
  return load(t);
}

template <class T>
float sum_of_squares(const T* x, int64_t C) {
  F a = set(0.0f), b = set(0.0f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= C; c += 2 * kLanes) {
    const F u = load(x + c), v = load(x + c + kLanes);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  for (; c < C; c += kLanes) {
    const F u = load_n(x + c, C - c < kLanes ? C - c : kLanes);
    a = fma(u, u, a);
  }
  return sum(a + b);
}

template <class T>
void add_rows(const T* x, const T* residual, T* h, int64_t C) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t n = C - c < kLanes ? C - c : kLanes;
    store_n(h + c, load_n(x + c, n) + load_n(residual + c, n), n);
  }
}

template <class T>
void scale_row(const T* x, const T* weight, T* y, int64_t C, float r, bool weight_in_fp32) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t n = C - c < kLanes ? C - c : kLanes;
    F v = load_n(x + c, n) * set(r);
    if (!weight_in_fp32) v = rounded(v, x);
    store_n(y + c, v * load_n(weight + c, n), n);
  }
}

template <class T>
void run(const RmsNormParams& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = row / p.H, h = row % p.H;
    const T* x = static_cast<const T*>(p.x) + t * p.x_t + h * p.x_h;
    T* y = static_cast<T*>(p.y) + t * p.y_t + h * p.y_h;
    if (p.residual) {
      T* sum = static_cast<T*>(p.residual_out) + t * p.residual_out_t + h * p.residual_out_h;
      add_rows(x, static_cast<const T*>(p.residual) + t * p.residual_t + h * p.residual_h, sum,
               p.C);
      x = sum;
    }
    const float mean = sum_of_squares(x, p.C) / static_cast<float>(p.C);
    scale_row(x, weight, y, p.C, 1.0f / sqrtf(mean + p.eps), p.weight_in_fp32);
  }
}

}  // namespace

namespace IVR_ISA {

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    run<bf16>(p, begin, end);
  } else {
    run<float>(p, begin, end);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
