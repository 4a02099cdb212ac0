#include "kernels/rms_norm.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "rms_norm", rms_norm);

// Rows below this many elements are not worth waking a thread for.
constexpr int64_t kGrainElements = 16384;

void rms_norm(Tensor x, Tensor weight, std::optional<Tensor> residual, Tensor y,
              std::optional<Tensor> residual_out, float eps, bool weight_in_fp32) {
  Checker check("rms_norm");
  const auto dtypes = {DType::f32, DType::bf16};
  check.tensor("x", x, dtypes, {"T", "H", "C"});
  check.tensor("weight", weight, {x.dtype}, {"C"});
  check.tensor("out", y, {x.dtype}, {"T", "H", "C"});
  check.require(eps >= 0, "eps is negative or NaN, expected a number >= 0");
  check.require(residual.has_value() == residual_out.has_value(),
                "residual and residual_out are given together or not at all");
  RmsNormParams p{.x = x.data,
                  .residual = nullptr,
                  .weight = weight.data,
                  .y = y.data,
                  .residual_out = nullptr,
                  .T = check["T"],
                  .H = check["H"],
                  .C = check["C"],
                  .x_t = x.stride(0),
                  .x_h = x.stride(1),
                  .residual_t = 0,
                  .residual_h = 0,
                  .y_t = y.stride(0),
                  .y_h = y.stride(1),
                  .residual_out_t = 0,
                  .residual_out_h = 0,
                  .eps = eps,
                  .weight_in_fp32 = weight_in_fp32,
                  .dtype = x.dtype};
  if (residual) {
    check.tensor("residual", *residual, {x.dtype}, {"T", "H", "C"});
    check.tensor("residual_out", *residual_out, {x.dtype}, {"T", "H", "C"});
    p.residual = residual->data;
    p.residual_t = residual->stride(0);
    p.residual_h = residual->stride(1);
    p.residual_out = residual_out->data;
    p.residual_out_t = residual_out->stride(0);
    p.residual_out_h = residual_out->stride(1);
  }
  if (p.T * p.H * p.C == 0) return;
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(rms_norm), p, x)) return;
  const auto run = kernel.pick();
  parallel_for(p.T * p.H, kGrainElements / p.C,
               [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(rms_norm) {
  m.def("rms_norm", recordable(&rms_norm), ReleaseGil(), py::arg("x"), py::arg("weight"),
        py::arg("residual"), py::arg("y"), py::arg("residual_out"), py::arg("eps"),
        py::arg("weight_in_fp32"));
}

}  // namespace ivr
