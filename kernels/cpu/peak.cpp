// peak on the CPU: fused multiply-adds, and the read.
#include "kernels/peak.h"

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

constexpr int kChains = 12;  // more than latency times units
constexpr int64_t kStreams = 4;
constexpr int64_t kAhead = 512;  // bytes

}  // namespace

namespace IVR_ISA {

void peak_products(int64_t rounds, int64_t& operations, float& sink) {
  const F x = set(sink);
  F acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = set(sink + static_cast<float>(i));  // all different
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = fma(x, x, acc[i]);
  }
  F all = set(0.0f);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) all = all + acc[i];
  sink = sum(all);
  operations = rounds * kChains * kLanes * 2;
}

void peak_read(const float* data, int64_t count, float& sink) {
  const int64_t each = count / kStreams / kLanes * kLanes;
  F acc[kStreams];
  for (F& a : acc) a = set(0.0f);
  for (int64_t i = 0; i < each; i += kLanes) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kStreams; ++s) {
      const float* at = data + s * each + i;
      __builtin_prefetch(at + kAhead / 4);
      acc[s] = acc[s] + load(at);
    }
  }
  sink = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace IVR_ISA
}  // namespace ivr
