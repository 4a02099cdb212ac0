// pixel_unshuffle_norm on the CPU. A row is gathered into its place in y and normalised there,
// while it is in L1. Bytes moved: 2 * r * r * C * size per row.
#include "kernels/pixel_unshuffle_mlp.h"

#include "kernels/cpu/layer_norm_row.h"

namespace ivr {
namespace {

template <class T>
void run(const PixelUnshuffleParams& p, int64_t begin, int64_t end) {
  const int64_t rows = p.h / p.r, columns = p.w / p.r, width = p.r * p.r * p.C;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i / (rows * columns), block = i % (rows * columns);
    const int64_t a = p.by_columns ? block % rows : block / columns;
    const int64_t b = p.by_columns ? block / rows : block % columns;
    const T* x = static_cast<const T*>(p.x) + t * p.x_t;
    T* y = static_cast<T*>(p.y) + i * p.y_row;
    for (int64_t u = 0; u < p.r; ++u) {
      for (int64_t v = 0; v < p.r; ++v) {
        const int64_t cell = (a * p.r + u) * p.w + b * p.r + v;
        memcpy(y + (u * p.r + v) * p.C, x + cell * p.x_cell, static_cast<size_t>(p.C) * sizeof(T));
      }
    }
    layer_norm_row(y, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), y, width,
                   p.eps);
  }
}

}  // namespace

namespace IVR_ISA {

void pixel_unshuffle_norm(const PixelUnshuffleParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    run<bf16>(p, begin, end);
  } else {
    run<float>(p, begin, end);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
