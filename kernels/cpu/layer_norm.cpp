// layer_norm on the CPU. One thread per group of rows; a row is read three times, from L1 after the
// first. Bytes moved: 2 * C * size per row.
#include "kernels/layer_norm.h"

#include "kernels/cpu/layer_norm_row.h"

namespace ivr {
namespace {

template <class T>
void run(const LayerNormParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    layer_norm_row(static_cast<const T*>(p.x) + t * p.x_t, static_cast<const T*>(p.weight),
                   static_cast<const T*>(p.bias), static_cast<T*>(p.y) + t * p.y_t, p.C, p.eps);
  }
}

}  // namespace

namespace IVR_ISA {

void layer_norm(const LayerNormParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    run<bf16>(p, begin, end);
  } else {
    run<float>(p, begin, end);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
