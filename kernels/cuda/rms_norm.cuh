// rms_norm on the GPU (contract: kernels/rms_norm.h; mapping: rows.cuh).
//
// Layout     a row is one (t, h): C contiguous elements.
// Bytes      T * H * C * size * (2, or 4 with a residual) + C * size.
#pragma once

#include "kernels/cuda/rows.cuh"
#include "kernels/rms_norm.h"

namespace ivr::cuda {

inline bool rms_norm_supported(const RmsNormParams& p) {
  return p.T <= kMaxIndex && p.H <= kMaxIndex && rows_supported(p.dtype, p.T * p.H, p.C);
}

// For a supported, non-empty p.
inline RowConfig rms_norm_config(const RmsNormParams& p) {
  const auto aligned = [&](const void* base, int64_t stride_t, int64_t stride_h) {
    return pointer_aligned(base) && stride_aligned(p.dtype, p.T, stride_t) &&
           stride_aligned(p.dtype, p.H, stride_h);
  };
  // A null residual pair counts as aligned.
  return row_config(
      p.dtype, p.T * p.H, p.C,
      stride_aligned(p.dtype, 2, p.C) && aligned(p.x, p.x_t, p.x_h) && aligned(p.y, p.y_t, p.y_h) &&
          aligned(p.residual, p.residual_t, p.residual_h) &&
          aligned(p.residual_out, p.residual_out_t, p.residual_out_h) && pointer_aligned(p.weight));
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
    // The weight is on its way while the group adds up.
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (member + i * threads_per_row) * kSize;
      w[i] = read_vector<kAligned>(weight + at, C - at);
    }
    sum = group_sum(sum, threads_per_row, scratch);
    const float inverse = rsqrtf(sum / static_cast<float>(p.C) + p.eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (member + i * threads_per_row) * kSize;
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
  IVR_SHARED(float, scratch, kRowMaxThreads / kWarpSize);
  rms_norm_row<T, kVectors, kAligned>(p, blockIdx.x * blockDim.y + threadIdx.y,
                                      static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                                      scratch);
}

}  // namespace ivr::cuda
