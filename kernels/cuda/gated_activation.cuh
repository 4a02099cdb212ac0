// gated_activation on the GPU (contract: kernels/gated_activation.h; mapping: chunks.cuh).
//
// The two halves of a row give two loads in flight per thread; y may be the first half of x,
// because a thread writes only where it has read. Bytes      3 * T * I * size.
#pragma once

#include "kernels/cuda/chunks.cuh"
#include "kernels/gated_activation.h"

namespace ivr::cuda {

inline bool gated_activation_supported(const GatedActivationParams& p) {
  return chunks_supported(p.dtype, p.T, p.I);
}

// For a supported, non-empty p.
inline ChunkConfig gated_activation_config(const GatedActivationParams& p) {
  return chunk_config(p.dtype, p.T, p.I,
                      stride_aligned(p.dtype, 2, p.I) && pointer_aligned(p.x) &&
                          stride_aligned(p.dtype, p.T, p.x_t) && pointer_aligned(p.y) &&
                          stride_aligned(p.dtype, p.T, p.y_t));
}

// x * sigmoid(alpha * x).
IVR_DEVICE float silu(float x, float alpha) { return fast_divide(x, 1.0f + expf(-alpha * x)); }

// GPT-OSS: the gate is cut off above, up at both ends; a NaN stays one.
IVR_DEVICE float clamped_gate(float gate, float up) {
  const float g = gate > 7.0f ? 7.0f : gate;
  const float u = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
  return silu(g, 1.702f) * (u + 1.0f);
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, bool kAligned>
IVR_DEVICE void gated_activation_block(const GatedActivationParams& p, unsigned chunks) {
  constexpr int kSize = Vec<T>::kSize;
  const auto [t, at] = chunk_place<T>(chunks);
  const T* gate = static_cast<const T*>(p.x) + t * p.x_t + at;
  T* y = static_cast<T*>(p.y) + t * p.y_t + at;
  const int n = static_cast<int>(p.I) - at;
  const Vec<T> gates = read_vector<kAligned>(gate, n);
  const Vec<T> ups = read_vector<kAligned>(gate + p.I, n);
  float g[kSize], u[kSize];
  unpack(gates, g);
  unpack(ups, u);
  if (p.gate == Gate::silu) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) g[i] = silu(g[i], 1.0f);
    round_to<T>(g);
#pragma unroll
    for (int i = 0; i < kSize; ++i) g[i] *= u[i];
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) g[i] = clamped_gate(g[i], u[i]);
  }
  Vec<T> out;
  pack(g, out);
  write_vector<kAligned>(y, out, n);
}

}  // namespace ivr::cuda
