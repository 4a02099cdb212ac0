// peak on dot products of bf16 pairs.
#include "kernels/cpu/simd.h"
#include "kernels/peak.h"

namespace ivr {
namespace {

constexpr int kChains = 12;  // more than latency times units

}  // namespace

namespace IVR_ISA {

void peak_products_dot(int64_t rounds, int64_t& operations, float& sink) {
  const F x = set(sink);
  F acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = set(sink + static_cast<float>(i));  // all different
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = dot_pairs(as_pairs(x), as_pairs(x), acc[i]);
  }
  F all = set(0.0f);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) all = all + acc[i];
  sink = sum(all);
  operations = rounds * kChains * kLanes * 4;
}

}  // namespace IVR_ISA
}  // namespace ivr
