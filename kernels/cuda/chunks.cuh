// Kernels without anything to add up over a row: a row is cut into chunks, a block takes one chunk
// and every thread one vector of 16 bytes of it.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace ivr::cuda {

struct ChunkConfig {
  unsigned chunks;  // of a row
  bool aligned;     // every row of every operand is whole vectors and starts on 16 bytes
  int64_t blocks;
};

constexpr int kChunkThreads = 128;

// For at least one row and one element.
constexpr ChunkConfig chunk_config(DType dtype, int64_t rows, int64_t elements, bool aligned) {
  const int64_t bytes = elements * static_cast<int64_t>(size_of(dtype));
  const int64_t chunks = (bytes + 16 * kChunkThreads - 1) / (16 * kChunkThreads);
  return {static_cast<unsigned>(chunks), aligned, rows * chunks};
}

constexpr bool chunks_supported(DType dtype, int64_t rows, int64_t elements) {
  return rows_supported(dtype, rows, elements) &&
         chunk_config(dtype, rows, elements, true).blocks <= kMaxIndex;
}

// `aligned=1 chunks=5 grid=1600`; returns what snprintf returns.
inline int format(const ChunkConfig& c, char* out, size_t size) {
  return std::snprintf(out, size, "aligned=%d chunks=%u grid=%lld", static_cast<int>(c.aligned),
                       c.chunks, static_cast<long long>(c.blocks));
}

struct ChunkPlace {
  int64_t row;
  int at;  // of the thread's vector, in elements; may lie behind the row
};

template <typename T>
IVR_DEVICE ChunkPlace chunk_place(unsigned chunks) {
  return {blockIdx.x / chunks,
          static_cast<int>(blockIdx.x % chunks * kChunkThreads + threadIdx.x) * Vec<T>::kSize};
}

}  // namespace ivr::cuda
