#include "kernels/pixel_unshuffle_mlp.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "pixel_unshuffle_norm", pixel_unshuffle_norm);

constexpr int64_t kGrainElements = 16384;

void pixel_unshuffle_norm(Tensor x, Tensor weight, Tensor bias, Tensor y, int64_t h, int64_t w,
                          int64_t r, bool by_columns, float eps) {
  Checker check("pixel_unshuffle_mlp");
  check.require(h >= 1 && w >= 1 && r >= 1 && h % r == 0 && w % r == 0, "grid is (", h, ", ", w,
                "), expected multiples of ratio=", r);
  check.require(eps >= 0, "eps is negative or NaN, expected a number >= 0");
  check.bind("h*w", h * w, "grid");
  check.tensor("x", x, {DType::f32, DType::bf16}, {"t", "h*w", "C"});
  check.bind("width", r * r * check["C"], "ratio and x");
  check.tensor("ln_weight", weight, {x.dtype}, {"width"});
  check.tensor("ln_bias", bias, {x.dtype}, {"width"});
  check.bind("rows", check["t"] * (h / r) * (w / r), "grid, ratio and x");
  check.tensor("rows", y, {x.dtype}, {"rows", "width"});
  const PixelUnshuffleParams p{.x = x.data,
                               .weight = weight.data,
                               .bias = bias.data,
                               .y = y.data,
                               .t = check["t"],
                               .h = h,
                               .w = w,
                               .r = r,
                               .C = check["C"],
                               .x_t = x.stride(0),
                               .x_cell = x.stride(1),
                               .y_row = y.stride(0),
                               .eps = eps,
                               .by_columns = by_columns,
                               .dtype = x.dtype};
  if (y.numel() == 0) return;
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(pixel_unshuffle_norm), p, x)) return;
  const auto run = kernel.pick();
  parallel_for(check["rows"], kGrainElements / check["width"],
               [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(pixel_unshuffle_mlp) {
  m.def("pixel_unshuffle_norm", recordable(&pixel_unshuffle_norm), ReleaseGil(), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("h"), py::arg("w"), py::arg("r"),
        py::arg("by_columns"), py::arg("eps"));
}

}  // namespace ivr
