// moe_combine on the CPU. Bytes moved: (k + 2) * N * size per token.
#include "kernels/moe_combine.h"

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

template <class T>
void run(const MoeCombineParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t t = begin; t < end; ++t) {
    const float* weights = p.weights + t * p.weights_t;
    const int32_t* places = p.places + t * p.places_t;
    for (int64_t i = 0; i < p.N; i += kLanes) {
      const int64_t n = p.N - i < kLanes ? p.N - i : kLanes;
      F sum = set(0.0f);
      for (int64_t j = 0; j < p.k; ++j) {
        sum = fma(set(weights[j]), load_n(x + places[j] * p.x_m + i, n), sum);
      }
      if (p.residual) {
        sum = load_n(static_cast<const T*>(p.residual) + t * p.residual_t + i, n) + sum;
      }
      store_n(static_cast<T*>(p.out) + t * p.out_t + i, sum, n);
    }
  }
}

}  // namespace

namespace IVR_ISA {

void moe_combine(const MoeCombineParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    run<bf16>(p, begin, end);
  } else {
    run<float>(p, begin, end);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
