// layer_norm on the GPU (contract: kernels/layer_norm.h; mapping: rows.cuh).
//
// The mean is known before the squares are summed, from the vectors that a thread holds; rows that
// no block can hold are streamed three times.
// Bytes      2 * T * C * size + 2 * C * size.
#pragma once

#include "kernels/cuda/rows.cuh"
#include "kernels/layer_norm.h"

namespace ivr::cuda {

inline bool layer_norm_supported(const LayerNormParams& p) {
  return rows_supported(p.dtype, p.T, p.C);
}

// For a supported, non-empty p.
inline RowConfig layer_norm_config(const LayerNormParams& p) {
  const auto aligned = [&](const void* base, int64_t stride) {
    return pointer_aligned(base) && stride_aligned(p.dtype, p.T, stride);
  };
  return row_config(p.dtype, p.T, p.C,
                    stride_aligned(p.dtype, 2, p.C) && aligned(p.x, p.x_t) && aligned(p.y, p.y_t) &&
                        pointer_aligned(p.weight) && pointer_aligned(p.bias));
}

template <typename T>
IVR_DEVICE float add_elements(const Vec<T>& v, float sum) {
  float f[Vec<T>::kSize];
  unpack(v, f);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) sum += f[i];
  return sum;
}

// Adds the squared distances to the mean of the first n elements.
template <bool kAligned, typename T>
IVR_DEVICE float add_deviations(const Vec<T>& v, int n, float mean, float sum) {
  float f[Vec<T>::kSize];
  unpack(v, f);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    const float d = f[i] - mean;
    if (kAligned ? n > 0 : i < n) sum += d * d;
  }
  return sum;
}

template <typename T>
IVR_DEVICE Vec<T> normalise(const Vec<T>& x, const Vec<T>& weight, const Vec<T>& bias, float mean,
                            float inverse) {
  float f[Vec<T>::kSize], w[Vec<T>::kSize], b[Vec<T>::kSize];
  unpack(x, f);
  unpack(weight, w);
  unpack(bias, b);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) f[i] = (f[i] - mean) * inverse * w[i] + b[i];
  Vec<T> y;
  pack(f, y);
  return y;
}

// What is normalised: `source(c)` is where element c of the row lies; with kAligned, the elements
// of a vector lie behind each other.
template <bool kAligned, typename T, typename Source>
IVR_DEVICE Vec<T> read_source(const Source& source, int at, int n) {
  Vec<T> v{};
  if constexpr (kAligned) {
    if (n > 0) v = load16(source(at));
  } else {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (i < n) insert_element_bits(v, i, load_raw<Bits>(source(at + i)));
    }
  }
  return v;
}

template <typename T>
struct LayerNormRow {
  const T* weight;
  const T* bias;
  T* y;
  int C;  // 0: this group has no row, but takes part in the collectives
  float channels;
  float eps;
};

// One row by one group. Every thread of the block must call it.
// scratch: two floats per warp of the block. A caller that loops over rows puts __syncthreads
// between them if threads_per_row > 32.
template <int kVectors, bool kAligned, typename T, typename Source>
IVR_DEVICE void layer_norm_row(const LayerNormRow<T>& row, const Source& source, int member,
                               int threads_per_row, Shared<float> scratch) {
  constexpr int kSize = Vec<T>::kSize;
  const int C = row.C;
  const Shared<float> square_scratch = scratch + kRowMaxThreads / kWarpSize;
  float sum = 0.0f, squares = 0.0f;

  if constexpr (kVectors > 0) {
    Vec<T> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (member + i * threads_per_row) * kSize;
      v[i] = read_source<kAligned, T>(source, at, C - at);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) sum = add_elements(v[i], sum);
    const float mean = group_sum(sum, threads_per_row, scratch) / row.channels;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (member + i * threads_per_row) * kSize;
      squares = add_deviations<kAligned>(v[i], C - at, mean, squares);
    }
    squares = group_sum(squares, threads_per_row, square_scratch);
    const float inverse = rsqrtf(squares / row.channels + row.eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (member + i * threads_per_row) * kSize;
      const Vec<T> w = read_vector<kAligned>(row.weight + at, C - at);
      const Vec<T> b = read_vector<kAligned>(row.bias + at, C - at);
      write_vector<kAligned>(row.y + at, normalise(v[i], w, b, mean, inverse), C - at);
    }
  } else {
    const int step = threads_per_row * kSize;
    for (int at = member * kSize; at < C; at += step) {
      sum = add_elements(read_source<kAligned, T>(source, at, C - at), sum);
    }
    const float mean = group_sum(sum, threads_per_row, scratch) / row.channels;
    for (int at = member * kSize; at < C; at += step) {
      const Vec<T> v = read_source<kAligned, T>(source, at, C - at);
      squares = add_deviations<kAligned>(v, C - at, mean, squares);
    }
    squares = group_sum(squares, threads_per_row, square_scratch);
    const float inverse = rsqrtf(squares / row.channels + row.eps);
    for (int at = member * kSize; at < C; at += step) {
      const Vec<T> v = read_source<kAligned, T>(source, at, C - at);
      const Vec<T> w = read_vector<kAligned>(row.weight + at, C - at);
      const Vec<T> b = read_vector<kAligned>(row.bias + at, C - at);
      write_vector<kAligned>(row.y + at, normalise(v, w, b, mean, inverse), C - at);
    }
  }
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, int kVectors, bool kAligned>
IVR_DEVICE void layer_norm_block(const LayerNormParams& p) {
  IVR_SHARED(float, scratch, 2 * kRowMaxThreads / kWarpSize);
  const int64_t t = blockIdx.x * blockDim.y + threadIdx.y;
  const T* x = static_cast<const T*>(p.x) + t * p.x_t;
  const LayerNormRow<T> row{.weight = static_cast<const T*>(p.weight),
                            .bias = static_cast<const T*>(p.bias),
                            .y = static_cast<T*>(p.y) + t * p.y_t,
                            .C = t < p.T ? static_cast<int>(p.C) : 0,
                            .channels = static_cast<float>(p.C),
                            .eps = p.eps};
  layer_norm_row<kVectors, kAligned>(
      row, [x](int c) { return x + c; }, static_cast<int>(threadIdx.x),
      static_cast<int>(blockDim.x), scratch);
}

}  // namespace ivr::cuda
