// gated_activation on the CPU. One pass; bytes moved: 3 * I * size per row.
#include "kernels/gated_activation.h"

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

inline F rounded(F x, const float*) { return x; }
inline F rounded(F x, const bf16*) {
  bf16 t[kLanes];
  store(t, x);
  return load(t);
}

template <class T>
void run(const GatedActivationParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(p.x) + t * p.x_t;
    const T* up = gate + p.I;
    T* y = static_cast<T*>(p.y) + t * p.y_t;
    for (int64_t i = 0; i < p.I; i += kLanes) {
      const int64_t n = p.I - i < kLanes ? p.I - i : kLanes;
      const F g = load_n(gate + i, n), u = load_n(up + i, n);
      if (p.gate == Gate::silu) {
        store_n(y + i, rounded(silu<kShort<T>>(g), gate) * u, n);
      } else {
        store_n(y + i, gpt_oss_gate<kShort<T>>(g, u), n);
      }
    }
  }
}

}  // namespace

namespace IVR_ISA {

void gated_activation(const GatedActivationParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    run<bf16>(p, begin, end);
  } else {
    run<float>(p, begin, end);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
