// rope on the CPU. One thread per group of tokens; a token's angles are computed once and shared by
// its heads. Bytes moved: 2 * (H + 2 K) * D * size.
#include "kernels/rope.h"

#include <math.h>

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

// sin and cos of n angles times scale, within 2 ulp of 1 for |angle| up to 1e9. The reduction by
// pi/2 is done in double, where it costs one step.
void sincos(const float* angle, int64_t n, float scale, float* sines, float* cosines) {
  constexpr double kTwoOverPi = 0.636619772367581343, kHalfPi = 1.57079632679489662;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes_here = n - j < kLanes ? n - j : kLanes;
    float r[kLanes], quadrant[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const double x = i < lanes_here ? angle[j + i] : 0.0;
      const double turns = (x * kTwoOverPi + kRound) - kRound;
      r[i] = static_cast<float>(x - turns * kHalfPi);
      const double q = (turns * 0.25 + kRound) - kRound;  // turns / 4, to nearest even
      quadrant[i] = static_cast<float>(turns - 4.0 * q);  // -2 .. 2
    }
    const F x = load(r), q = load(quadrant), x2 = x * x, one = set(1.0f), zero = set(0.0f);
    F s = fma(set(-1.9515295891e-4f), x2, set(8.3321608736e-3f));
    s = fma(s, x2, set(-1.6666654611e-1f));
    s = fma(s * x2, x, x);
    F c = fma(set(2.443315711809948e-5f), x2, set(-1.388731625493765e-3f));
    c = fma(c, x2, set(4.166664568298827e-2f));
    c = fma(c, x2 * x2, fma(set(-0.5f), x2, one));
    // Quadrants: 0 (s, c), 1 (c, -s), +-2 (-s, -c), -1 (-c, s). |q| is 1 where q^2 lies in (0.5,
    // 2).
    const F q2 = q * q;
    const F odd = select_lt(set(0.5f), q2, select_lt(q2, set(2.0f), one, zero), zero);
    const F sine = select_lt(zero, odd, c, s), cosine = select_lt(zero, odd, s, c);
    const F even_sign = select_lt(set(2.0f), q2, set(-1.0f), one);
    const F sine_sign = select_lt(zero, odd, q, even_sign);
    const F cosine_sign = select_lt(zero, odd, zero - q, even_sign);
    store_n(sines + j, sine * sine_sign * set(scale), lanes_here);
    store_n(cosines + j, cosine * cosine_sign * set(scale), lanes_here);
  }
}

// y may be x: a pair is read before it is written.
template <class T>
void rotate(const T* x, const float* sines, const float* cosines, int64_t half, int64_t D, T* y) {
  for (int64_t j = 0; j < half; j += kLanes) {
    const int64_t n = half - j < kLanes ? half - j : kLanes;
    const F a = load_n(x + j, n), b = load_n(x + half + j, n);
    const F s = load_n(sines + j, n), c = load_n(cosines + j, n);
    store_n(y + j, fma(a, c, set(0.0f) - b * s), n);
    store_n(y + half + j, fma(b, c, a * s), n);
  }
  if (y != x) memcpy(y + 2 * half, x + 2 * half, static_cast<size_t>(D - 2 * half) * sizeof(T));
}

template <class T>
void run(const RopeParams& p, int64_t begin, int64_t end) {
  float angles[kRopeMaxDim / 2], sines[kRopeMaxDim / 2], cosines[kRopeMaxDim / 2];
  for (int64_t t = begin; t < end; ++t) {
    const float* inv_freq = p.inv_freq + p.sequence[t] * p.inv_freq_b;
    for (int64_t j = 0; j < p.half; ++j) angles[j] = p.positions[t] * inv_freq[j];
    sincos(angles, p.half, p.scale[p.sequence[t]], sines, cosines);
    for (int64_t h = 0; h < p.H; ++h) {
      rotate(static_cast<const T*>(p.q) + t * p.q_t + h * p.q_h, sines, cosines, p.half, p.D,
             static_cast<T*>(p.out) + t * p.out_t + h * p.out_h);
    }
    if (p.slots[t] < 0) continue;
    const int64_t page = p.slots[t] / p.P, offset = p.slots[t] % p.P;
    for (int64_t h = 0; h < p.K; ++h) {
      rotate(static_cast<const T*>(p.k) + t * p.k_t + h * p.k_h, sines, cosines, p.half, p.D,
             static_cast<T*>(p.k_cache) + page * p.k_page + h * p.k_cache_h + offset * p.k_p);
      memcpy(static_cast<T*>(p.v_cache) + page * p.v_page + h * p.v_cache_h + offset * p.v_p,
             static_cast<const T*>(p.v) + t * p.v_t + h * p.v_h,
             static_cast<size_t>(p.D) * sizeof(T));
    }
  }
}

}  // namespace

namespace IVR_ISA {

void rope(const RopeParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    run<bf16>(p, begin, end);
  } else {
    run<float>(p, begin, end);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
