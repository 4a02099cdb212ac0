// Kernels that walk over rows of contiguous elements: how a row is cut into vectors of 16 bytes and
// who gets which, reading and writing the vectors, sums over a row.
//
// Mapping    a group of threads_per_row threads owns a row; vector v belongs to member
//            v % threads_per_row. A row of up to 32 vectors is one vector a thread and several rows
//            a warp (head dims 64, 128); up to 128 vectors one warp, no barrier; above, one block.
// Memory     vectors are read once and stay packed in registers between the passes; rows beyond
//            4096 vectors (32768 bf16, 16384 f32) are streamed once per pass.
// Alignment  where a vector is not whole or not aligned, rows are streamed element by element. This
//            decides how a vector is fetched, never which thread adds what in which order: a row's
//            bits depend on its length and the dtype alone.
#pragma once

#include <cstdio>
#include <limits>
#include <type_traits>

#include "kernels/cuda/prim.cuh"
#include "kernels/dtype.h"

namespace ivr::cuda {

// ---- configuration: a pure function of the description ------------------------------------------

struct RowConfig {
  int threads_per_row;  // a power of two; above 32 the whole block
  int rows_per_block;
  int vectors;   // held by each thread between the passes; 0: the row is streamed
  bool aligned;  // every row of every operand is whole vectors and starts on 16 bytes
  unsigned blocks;
};

// Warps per block where a warp or less owns a row.
constexpr int kRowWarps = 4;
constexpr int kRowMaxThreads = 1024;
// Four 16-byte loads in flight per thread, per operand, hide the latency without full occupancy.
constexpr int kRowVectors = 4;

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxRow = int64_t{1} << 30;  // elements; room for the stride of a streaming block

constexpr bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16; }

// False where a size overflows the 32-bit row or element index.
constexpr bool rows_supported(DType dtype, int64_t rows, int64_t elements) {
  return is_float(dtype) && elements <= kMaxRow && rows <= kMaxIndex;
}

// Whether `count` pieces that lie `stride` elements apart all start on 16 bytes if the first does.
constexpr bool stride_aligned(DType dtype, int64_t count, int64_t stride) {
  return count <= 1 || stride * static_cast<int64_t>(size_of(dtype)) % 16 == 0;
}

inline bool pointer_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// For at least one row and one element. Only `blocks` depends on the number of rows: a token's bits
// are the same whatever batch it comes in.
inline RowConfig row_config(DType dtype, int64_t rows, int64_t elements, bool aligned) {
  const int64_t row_vectors = (elements * static_cast<int64_t>(size_of(dtype)) + 15) / 16;
  const auto power_of_two = [](int64_t n) {
    int p2 = 1;
    while (p2 < n) p2 *= 2;
    return p2;
  };
  RowConfig c{};
  c.aligned = aligned;
  if (row_vectors <= 32) {
    c.vectors = 1;
    c.threads_per_row = power_of_two(row_vectors);
  } else if (row_vectors <= int64_t{kRowVectors} * kRowMaxThreads) {
    c.vectors = kRowVectors;
    c.threads_per_row = power_of_two((row_vectors + kRowVectors - 1) / kRowVectors);
    if (c.threads_per_row < 32) c.threads_per_row = 32;
  } else {
    c.vectors = 0;
    c.threads_per_row = kRowMaxThreads;
  }
  if (!aligned) c.vectors = 0;
  const int group = 32 * kRowWarps;
  c.rows_per_block = c.threads_per_row <= 32 ? group / c.threads_per_row : 1;
  c.blocks = static_cast<unsigned>((rows + c.rows_per_block - 1) / c.rows_per_block);
  return c;
}

// `vectors=4 aligned=1 block=32x4 grid=64`; returns what snprintf returns.
inline int format(const RowConfig& c, char* out, size_t size) {
  return std::snprintf(out, size, "vectors=%d aligned=%d block=%dx%d grid=%u", c.vectors,
                       static_cast<int>(c.aligned), c.threads_per_row, c.rows_per_block, c.blocks);
}

// Calls f.template operator()<T, kAligned>() for the dtype and the alignment: the one table that
// launchers and the emulator share.
template <typename F>
void with_element(DType dtype, bool aligned, F&& f) {
  const auto with_alignment = [&]<typename T>() {
    aligned ? f.template operator()<T, true>() : f.template operator()<T, false>();
  };
  dtype == DType::f32 ? with_alignment.template operator()<float>()
                      : with_alignment.template operator()<bf16>();
}

// Calls f.template operator()<T, kVectors, kAligned>() for the kernel that c names.
template <typename F>
void with_row_kernel(DType dtype, const RowConfig& c, F&& f) {
  with_element(dtype, c.aligned, [&]<typename T, bool kAligned>() {
    if constexpr (kAligned) {
      if (c.vectors == 1) return f.template operator()<T, 1, true>();
      if (c.vectors == kRowVectors) return f.template operator()<T, kRowVectors, true>();
    }
    return f.template operator()<T, 0, kAligned>();
  });
}

// ---- device -------------------------------------------------------------------------------------

// The vector that starts at p, of whose elements n belong to the row (n <= 0: none); the others are
// zero.
template <bool kAligned, typename T>
IVR_DEVICE Vec<T> read_vector(const T* p, int n) {
  if constexpr (!kAligned) return load_elements(p, n);
  Vec<T> v{};
  if (n > 0) v = load16(p);
  return v;
}

template <bool kAligned, typename T>
IVR_DEVICE void write_vector(T* p, const Vec<T>& v, int n) {
  if constexpr (!kAligned) {
    store_elements(p, v, n);
  } else if (n > 0) {
    store16(p, v);
  }
}

// Sum over the group of `threads_per_row` threads. scratch: one float per warp of the block.
IVR_DEVICE float group_sum(float v, int threads_per_row, Shared<float> scratch) {
  v = warp_sum(v, threads_per_row < kWarpSize ? threads_per_row : kWarpSize);
  if (threads_per_row <= kWarpSize) return v;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = lane < threads_per_row / kWarpSize ? static_cast<float>(scratch[lane]) : 0.0f;
  return warp_sum(v, kWarpSize);
}

}  // namespace ivr::cuda
