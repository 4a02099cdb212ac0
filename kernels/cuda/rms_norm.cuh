// rms_norm on the GPU (contract: kernels/rms_norm.h).
//
// Layout     a row is one (t, h): C contiguous elements, cut into vectors of 16 bytes.
// Mapping    a group of threads_per_row threads owns a row; vector v belongs to member
//            v % threads_per_row. A row of up to 32 vectors is one vector a thread and several rows
//            a warp (head dims 64, 128); up to 128 vectors one warp, no barrier; above, one block.
// Memory     x and residual are read once and stay packed in registers between the two passes;
//            rows beyond 4096 vectors (32768 bf16, 16384 f32) are streamed twice.
// Alignment  decides only how a vector is fetched (16 bytes at once where every vector is whole and
//            aligned, else element by element), never which thread adds what: a row's bits depend
//            on C and the dtype alone.
// Bytes      T * H * C * size * (2, or 4 with a residual) + C * size.
#pragma once

#include <cstdio>
#include <limits>
#include <type_traits>

#include "kernels/cuda/prim.cuh"
#include "kernels/rms_norm.h"

namespace ivr::cuda {

// ---- configuration: a pure function of the description ------------------------------------------

struct RmsNormConfig {
  int threads_per_row;  // a power of two; above 32 the whole block
  int rows_per_block;
  int vectors;   // held by each thread between the passes; 0: the row is streamed twice
  bool aligned;  // every row of every operand is whole vectors and starts on 16 bytes
  unsigned blocks;
};

// Warps per block where a warp or less owns a row.
constexpr int kRmsNormWarps = 4;
constexpr int kRmsNormMaxThreads = 1024;
// Four 16-byte loads in flight per thread, per operand, hide the latency without full occupancy.
constexpr int kRmsNormVectors = 4;

// False where a size overflows the 32-bit row or element index.
inline bool rms_norm_supported(const RmsNormParams& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  constexpr int64_t kMaxC = int64_t{1} << 30;  // room for the stride of a streaming block
  if (p.dtype != DType::f32 && p.dtype != DType::bf16) return false;
  return p.C <= kMaxC && p.T <= kMax && p.H <= kMax && p.T * p.H <= kMax;
}

inline bool rms_norm_aligned(const RmsNormParams& p) {
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const auto rows_aligned = [&](const void* base, int64_t stride_t, int64_t stride_h) {
    const bool t = p.T == 1 || stride_t * size % 16 == 0;
    const bool h = p.H == 1 || stride_h * size % 16 == 0;
    return t && h && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  };
  // A null residual pair counts as aligned.
  return p.C * size % 16 == 0 && rows_aligned(p.x, p.x_t, p.x_h) &&
         rows_aligned(p.y, p.y_t, p.y_h) && rows_aligned(p.residual, p.residual_t, p.residual_h) &&
         rows_aligned(p.residual_out, p.residual_out_t, p.residual_out_h) &&
         reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
}

// For a supported, non-empty p. Only `blocks` depends on the number of rows: a token's bits are the
// same whatever batch it comes in.
inline RmsNormConfig rms_norm_config(const RmsNormParams& p) {
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const int64_t row_vectors = (p.C * size + 15) / 16;
  const auto power_of_two = [](int64_t n) {
    int p2 = 1;
    while (p2 < n) p2 *= 2;
    return p2;
  };
  RmsNormConfig c{};
  c.aligned = rms_norm_aligned(p);
  if (row_vectors <= 32) {
    c.vectors = 1;
    c.threads_per_row = power_of_two(row_vectors);
  } else if (row_vectors <= int64_t{kRmsNormVectors} * kRmsNormMaxThreads) {
    c.vectors = kRmsNormVectors;
    c.threads_per_row = power_of_two((row_vectors + kRmsNormVectors - 1) / kRmsNormVectors);
    if (c.threads_per_row < 32) c.threads_per_row = 32;
  } else {
    c.vectors = 0;
    c.threads_per_row = kRmsNormMaxThreads;
  }
  const int group = 32 * kRmsNormWarps;
  c.rows_per_block = c.threads_per_row <= 32 ? group / c.threads_per_row : 1;
  c.blocks = static_cast<unsigned>((p.T * p.H + c.rows_per_block - 1) / c.rows_per_block);
  return c;
}

// `vectors=4 aligned=1 block=32x4 grid=64`; returns what snprintf returns.
inline int format(const RmsNormConfig& c, char* out, size_t size) {
  return std::snprintf(out, size, "vectors=%d aligned=%d block=%dx%d grid=%u", c.vectors,
                       static_cast<int>(c.aligned), c.threads_per_row, c.rows_per_block, c.blocks);
}

// Calls f.template operator()<T, kVectors, kAligned>() for the kernel that c names: the one table
// that the launcher and the emulator share.
template <typename F>
void with_rms_norm_kernel(DType dtype, const RmsNormConfig& c, F&& f) {
  const auto with_alignment = [&]<typename T, int kVectors>() {
    c.aligned ? f.template operator()<T, kVectors, true>()
              : f.template operator()<T, kVectors, false>();
  };
  const auto with_vectors = [&]<typename T>() {
    switch (c.vectors) {
      case 0:
        return with_alignment.template operator()<T, 0>();
      case 1:
        return with_alignment.template operator()<T, 1>();
      default:
        return with_alignment.template operator()<T, kRmsNormVectors>();
    }
  };
  dtype == DType::f32 ? with_vectors.template operator()<float>()
                      : with_vectors.template operator()<bf16>();
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

// x + residual, rounded to the dtype.
template <typename T>
IVR_DEVICE Vec<T> add_vectors(const Vec<T>& x, const Vec<T>& residual) {
  float a[Vec<T>::kSize], b[Vec<T>::kSize];
  unpack(x, a);
  unpack(residual, b);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) a[i] += b[i];
  Vec<T> sum;
  pack(a, sum);
  return sum;
}

template <typename T>
IVR_DEVICE float add_squares(const Vec<T>& v, float sum) {
  float f[Vec<T>::kSize];
  unpack(v, f);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) sum += f[i] * f[i];
  return sum;
}

template <typename T>
IVR_DEVICE Vec<T> scale(const Vec<T>& x, const Vec<T>& weight, float scale, bool weight_in_fp32) {
  float f[Vec<T>::kSize], w[Vec<T>::kSize];
  unpack(x, f);
  unpack(weight, w);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) f[i] *= scale;
  if (!weight_in_fp32) round_to<T>(f);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) f[i] *= w[i];
  Vec<T> y;
  pack(f, y);
  return y;
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

// One row by one group. Every thread of the block must call it; those whose row lies at or behind
// T * H take part in the collectives and touch no memory.
// member: this thread's place in its group, which is threadIdx.x where the group is the block.
// A caller that loops over rows puts __syncthreads between them if threads_per_row > 32.
template <typename T, int kVectors, bool kAligned>
IVR_DEVICE void rms_norm_row(const RmsNormParams& p, unsigned row, int member, int threads_per_row,
                             Shared<float> scratch) {
  constexpr int kSize = Vec<T>::kSize;
  const unsigned heads = static_cast<unsigned>(p.H);
  const bool active = row < static_cast<unsigned>(p.T) * heads;
  const int64_t t = row / heads;
  const int64_t h = row % heads;
  const int C = active ? static_cast<int>(p.C) : 0;

  const T* x = static_cast<const T*>(p.x) + t * p.x_t + h * p.x_h;
  const T* residual = static_cast<const T*>(p.residual) + t * p.residual_t + h * p.residual_h;
  T* residual_out = static_cast<T*>(p.residual_out) + t * p.residual_out_t + h * p.residual_out_h;
  T* y = static_cast<T*>(p.y) + t * p.y_t + h * p.y_h;
  const T* weight = static_cast<const T*>(p.weight);
  const bool has_residual = p.residual != nullptr;

  if constexpr (kVectors > 0) {
    Vec<T> v[kVectors], w[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (member + i * threads_per_row) * kSize;
      v[i] = read_vector<kAligned>(x + at, C - at);
    }
    if (has_residual) {
      Vec<T> r[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = (member + i * threads_per_row) * kSize;
        r[i] = read_vector<kAligned>(residual + at, C - at);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = (member + i * threads_per_row) * kSize;
        v[i] = add_vectors(v[i], r[i]);
        write_vector<kAligned>(residual_out + at, v[i], C - at);
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) sum = add_squares(v[i], sum);
    // The weight is on its way while the group adds up; element by element that would spill.
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = (member + i * threads_per_row) * kSize;
        w[i] = read_vector<kAligned>(weight + at, C - at);
      }
    }
    sum = group_sum(sum, threads_per_row, scratch);
    const float inverse = rsqrtf(sum / static_cast<float>(p.C) + p.eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (member + i * threads_per_row) * kSize;
      if constexpr (!kAligned) w[i] = read_vector<kAligned>(weight + at, C - at);
      write_vector<kAligned>(y + at, scale(v[i], w[i], inverse, p.weight_in_fp32), C - at);
    }
  } else {
    float sum = 0.0f;
    for (int at = member * kSize; at < C; at += threads_per_row * kSize) {
      Vec<T> v = read_vector<kAligned>(x + at, C - at);
      if (has_residual) {
        v = add_vectors(v, read_vector<kAligned>(residual + at, C - at));
        write_vector<kAligned>(residual_out + at, v, C - at);
      }
      sum = add_squares(v, sum);
    }
    sum = group_sum(sum, threads_per_row, scratch);
    const float inverse = rsqrtf(sum / static_cast<float>(p.C) + p.eps);
    // A thread reads back only what it wrote itself, so no barrier stands between the passes.
    const T* h_row = has_residual ? residual_out : x;
    for (int at = member * kSize; at < C; at += threads_per_row * kSize) {
      const Vec<T> v = read_vector<kAligned>(h_row + at, C - at);
      const Vec<T> w = read_vector<kAligned>(weight + at, C - at);
      write_vector<kAligned>(y + at, scale(v, w, inverse, p.weight_in_fp32), C - at);
    }
  }
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, int kVectors, bool kAligned>
IVR_DEVICE void rms_norm_block(const RmsNormParams& p) {
  IVR_SHARED(float, scratch, kRmsNormMaxThreads / kWarpSize);
  rms_norm_row<T, kVectors, kAligned>(p, blockIdx.x * blockDim.y + threadIdx.y,
                                      static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                                      scratch);
}

}  // namespace ivr::cuda
