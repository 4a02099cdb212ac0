// moe_combine on the GPU (contract: kernels/moe_combine.h; mapping: chunks.cuh).
//
// A place out of range, which only the device can see, makes its token NaN. Bytes: (k + 2) * N *
// size per token, and a place and a weight per expert and chunk.
#pragma once

#include "kernels/cuda/chunks.cuh"
#include "kernels/moe_combine.h"

namespace ivr::cuda {

// Experts whose rows are on their way at once.
constexpr int kCombineBatch = 4;

inline bool moe_combine_supported(const MoeCombineParams& p) {
  return chunks_supported(p.dtype, p.T, p.N) && p.M <= kMaxIndex && p.k <= kMaxIndex;
}

// For a supported, non-empty p.
inline ChunkConfig moe_combine_config(const MoeCombineParams& p) {
  // A null residual counts as aligned.
  return chunk_config(p.dtype, p.T, p.N,
                      stride_aligned(p.dtype, 2, p.N) && pointer_aligned(p.x) &&
                          stride_aligned(p.dtype, p.M, p.x_m) && pointer_aligned(p.residual) &&
                          stride_aligned(p.dtype, p.T, p.residual_t) && pointer_aligned(p.out) &&
                          stride_aligned(p.dtype, p.T, p.out_t));
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, bool kAligned>
IVR_DEVICE void moe_combine_block(const MoeCombineParams& p, unsigned chunks) {
  constexpr int kSize = Vec<T>::kSize;
  const auto [t, at] = chunk_place<T>(chunks);
  const int n = static_cast<int>(p.N) - at, k = static_cast<int>(p.k);
  const T* x = static_cast<const T*>(p.x);
  float sum[kSize] = {};
  for (int j = 0; j < k; j += kCombineBatch) {
    int64_t places[kCombineBatch];
    float weights[kCombineBatch];
    Vec<T> rows[kCombineBatch];
#pragma unroll
    for (int i = 0; i < kCombineBatch; ++i) {
      const bool there = j + i < k;
      places[i] = there ? load_raw<int32_t>(p.places + t * p.places_t + j + i) : -1;
      weights[i] = there ? load_raw<float>(p.weights + t * p.weights_t + j + i) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kCombineBatch; ++i) {
      const bool there = places[i] >= 0 && places[i] < p.M;
      rows[i] = {{~0u, ~0u, ~0u, ~0u}};  // NaN in either dtype
      if (there) rows[i] = read_vector<kAligned>(x + places[i] * p.x_m + at, n);
    }
#pragma unroll
    for (int i = 0; i < kCombineBatch; ++i) {
      if (j + i >= k) continue;
      float f[kSize];
      unpack(rows[i], f);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum[e] = fmaf(weights[i], f[e], sum[e]);
    }
  }
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + t * p.residual_t + at;
    float f[kSize];
    unpack(read_vector<kAligned>(residual, n), f);
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum[e] = f[e] + sum[e];
  }
  Vec<T> out;
  pack(sum, out);
  write_vector<kAligned>(static_cast<T*>(p.out) + t * p.out_t + at, out, n);
}

}  // namespace ivr::cuda
