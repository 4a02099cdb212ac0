// pixel_unshuffle_norm on the GPU (contract: kernels/pixel_unshuffle_mlp.h; mapping: rows.cuh).
//
// A row of r * r cells is gathered straight into registers and normalised there.
// Bytes      2 * t * h * w * C * size + 2 * r * r * C * size.
#pragma once

#include "kernels/cuda/layer_norm.cuh"
#include "kernels/pixel_unshuffle_mlp.h"

namespace ivr::cuda {

inline int64_t pixel_unshuffle_rows(const PixelUnshuffleParams& p) {
  return p.t * (p.h / p.r) * (p.w / p.r);
}
inline int64_t pixel_unshuffle_width(const PixelUnshuffleParams& p) { return p.r * p.r * p.C; }

inline bool pixel_unshuffle_supported(const PixelUnshuffleParams& p) {
  return p.h <= kMaxIndex && p.w <= kMaxIndex && p.h * p.w <= kMaxIndex && p.t <= kMaxIndex &&
         p.r * p.w * p.x_cell <= kMaxIndex &&  // steps within a block of cells are 32-bit
         rows_supported(p.dtype, pixel_unshuffle_rows(p), pixel_unshuffle_width(p));
}

// For a supported, non-empty p.
inline RowConfig pixel_unshuffle_config(const PixelUnshuffleParams& p) {
  const int64_t rows = pixel_unshuffle_rows(p);
  const bool aligned = stride_aligned(p.dtype, 2, p.C) && pointer_aligned(p.x) &&
                       stride_aligned(p.dtype, p.t, p.x_t) &&
                       stride_aligned(p.dtype, p.h * p.w, p.x_cell) && pointer_aligned(p.y) &&
                       stride_aligned(p.dtype, rows, p.y_row) && pointer_aligned(p.weight) &&
                       pointer_aligned(p.bias);
  return row_config(p.dtype, rows, pixel_unshuffle_width(p), aligned);
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, int kVectors, bool kAligned>
IVR_DEVICE void pixel_unshuffle_block(const PixelUnshuffleParams& p) {
  IVR_SHARED(float, scratch, 2 * kRowMaxThreads / kWarpSize);
  const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
  const int r = static_cast<int>(p.r), C = static_cast<int>(p.C);
  const unsigned rows = static_cast<unsigned>(p.h) / r, columns = static_cast<unsigned>(p.w) / r;
  const unsigned tile = row / (rows * columns), block = row % (rows * columns);
  const unsigned a = p.by_columns ? block % rows : block / columns;
  const unsigned b = p.by_columns ? block / rows : block % columns;
  const int64_t corner = a * r * p.w + b * r;
  const T* x = static_cast<const T*>(p.x) + tile * p.x_t + corner * p.x_cell;
  const int next_row = static_cast<int>(p.w * p.x_cell), next_cell = static_cast<int>(p.x_cell);
  const LayerNormRow<T> out{.weight = static_cast<const T*>(p.weight),
                            .bias = static_cast<const T*>(p.bias),
                            .y = static_cast<T*>(p.y) + row * p.y_row,
                            .C = tile < p.t ? r * r * C : 0,
                            .channels = static_cast<float>(r * r * C),
                            .eps = p.eps};
  const auto source = [=](int c) {
    const int cell = c / C, above = cell / r;
    return x + (above * next_row + (cell - above * r) * next_cell + (c - cell * C));
  };
  layer_norm_row<kVectors, kAligned>(out, source, static_cast<int>(threadIdx.x),
                                     static_cast<int>(blockDim.x), scratch);
}

}  // namespace ivr::cuda
