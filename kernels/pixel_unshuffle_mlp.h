// pixel_unshuffle_norm: the first half of pixel_unshuffle_mlp; two linear products follow it.
//
// Patch features x [t, h * w, C] (row-major cells) become rows of r * r * C channels, one per block
// of r x r cells, normalised (see layer_norm.h). A row's channels are the block's cells in
// row-major order. The blocks of a tile follow each other row by row (version v2) or column by
// column (v1).
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

struct PixelUnshuffleParams {
  const void* x;       // [t, h * w, C], C contiguous
  const void* weight;  // [r * r * C] contiguous, same dtype as x
  const void* bias;    // [r * r * C] contiguous, same dtype as x
  void* y;             // [t * (h / r) * (w / r), r * r * C]
  int64_t t, h, w, r, C;
  int64_t x_t, x_cell, y_row;  // strides in elements
  float eps;
  bool by_columns;  // version v1
  DType dtype;      // f32 or bf16
};

// Rows [begin, end) of y.
IVR_CPU_KERNEL(pixel_unshuffle_norm, const PixelUnshuffleParams& p, int64_t begin, int64_t end)

}  // namespace ivr
