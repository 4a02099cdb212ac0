// embed_scatter on the GPU (contract: kernels/embed_scatter.h; mapping: chunks.cuh).
//
// Which row a token takes is decided here, so that ids that were sampled on the device never visit
// the host. Bytes: 2 * T * C * size, and T ids.
#pragma once

#include "kernels/cuda/chunks.cuh"
#include "kernels/embed_scatter.h"

namespace ivr::cuda {

inline bool embed_scatter_supported(const EmbedScatterParams& p) {
  return chunks_supported(p.dtype, p.T, p.C);
}

// For a supported, non-empty p.
inline ChunkConfig embed_scatter_config(const EmbedScatterParams& p) {
  // A null image counts as aligned.
  return chunk_config(p.dtype, p.T, p.C,
                      stride_aligned(p.dtype, 2, p.C) && pointer_aligned(p.table) &&
                          stride_aligned(p.dtype, p.V, p.table_v) && pointer_aligned(p.image) &&
                          stride_aligned(p.dtype, p.N, p.image_n) && pointer_aligned(p.out) &&
                          stride_aligned(p.dtype, p.T, p.out_t));
}

// The row that token t takes; null where its id or image row is out of range.
template <typename T>
IVR_DEVICE const T* embedding_row(const EmbedScatterParams& p, int64_t t) {
  const int64_t row = p.image_row != nullptr ? load_raw<int64_t>(p.image_row + t) : -1;
  if (row >= 0) return row < p.N ? static_cast<const T*>(p.image) + row * p.image_n : nullptr;
  const int64_t id = load_raw<int64_t>(p.ids + t);
  return id >= 0 && id < p.V ? static_cast<const T*>(p.table) + id * p.table_v : nullptr;
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, bool kAligned>
IVR_DEVICE void embed_scatter_block(const EmbedScatterParams& p, unsigned chunks) {
  const auto [t, at] = chunk_place<T>(chunks);
  const int n = static_cast<int>(p.C) - at;
  const T* source = embedding_row<T>(p, t);
  Vec<T> v{{~0u, ~0u, ~0u, ~0u}};  // NaN in either dtype
  if (source != nullptr) v = read_vector<kAligned>(source + at, n);
  write_vector<kAligned>(static_cast<T*>(p.out) + t * p.out_t + at, v, n);
}

}  // namespace ivr::cuda
