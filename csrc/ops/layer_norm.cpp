#include "kernels/layer_norm.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "layer_norm", layer_norm);

constexpr int64_t kGrainElements = 16384;

void layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor y, float eps) {
  Checker check("layer_norm");
  check.tensor("x", x, {DType::f32, DType::bf16}, {"T", "C"});
  check.tensor("weight", weight, {x.dtype}, {"C"});
  check.tensor("bias", bias, {x.dtype}, {"C"});
  check.tensor("out", y, {x.dtype}, {"T", "C"});
  check.require(eps >= 0, "eps is negative or NaN, expected a number >= 0");
  const LayerNormParams p{.x = x.data,
                          .weight = weight.data,
                          .bias = bias.data,
                          .y = y.data,
                          .T = check["T"],
                          .C = check["C"],
                          .x_t = x.stride(0),
                          .y_t = y.stride(0),
                          .eps = eps,
                          .dtype = x.dtype};
  if (p.T * p.C == 0) return;
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(layer_norm), p, x)) return;
  const auto run = kernel.pick();
  parallel_for(p.T, kGrainElements / p.C, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(layer_norm) {
  m.def("layer_norm", recordable(&layer_norm), ReleaseGil(), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("y"), py::arg("eps"));
}

}  // namespace ivr
