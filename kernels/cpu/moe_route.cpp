// moe_route on the CPU: one pass over a row that keeps the k best sorted, and the softmax.
#include "kernels/moe_route.h"

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

inline bool beats(float a, float b) { return a > b || (a != a && b == b); }

template <class T>
void choose(const T* x, int64_t E, int64_t k, int32_t* ids, float* best) {
  int64_t n = 0;
  for (int64_t e = 0; e < E; ++e) {
    const float v = to_float(x[e]);
    if (n == k && !beats(v, best[k - 1])) continue;
    int64_t j = n < k ? n++ : k - 1;
    for (; j > 0 && beats(v, best[j - 1]); --j) {
      best[j] = best[j - 1];
      ids[j] = ids[j - 1];
    }
    best[j] = v;
    ids[j] = static_cast<int32_t>(e);
  }
}

// The sum of e^(x - max).
template <class T>
float sum_of_exp(const T* x, int64_t n, float max) {
  F total = set(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total = total + exp_small(load(x + i) - set(max));
  if (i < n) {
    float tail[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      tail[j] = i + j < n ? to_float(x[i + j]) : -__builtin_inff();
    }
    total = total + exp_small(load(tail) - set(max));
  }
  return sum(total);
}

template <class T>
void run(const MoeRouteParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.logits) + t * p.logits_t;
    float* w = p.weights + t * p.weights_t;
    choose(x, p.E, p.k, p.ids + t * p.ids_t, w);
    const float max = w[0];
    const float total = p.normalize ? sum_of_exp(w, p.k, max) : sum_of_exp(x, p.E, max);
    for (int64_t j = 0; j < p.k; j += kLanes) {
      const int64_t n = p.k - j < kLanes ? p.k - j : kLanes;
      store_n(w + j, exp_small(load_n(w + j, n) - set(max)) / set(total), n);
    }
  }
}

}  // namespace

namespace IVR_ISA {

void moe_route(const MoeRouteParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    run<bf16>(p, begin, end);
  } else {
    run<float>(p, begin, end);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
