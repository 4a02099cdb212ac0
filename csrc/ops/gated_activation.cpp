#include "kernels/gated_activation.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "gated_activation", gated_activation);

constexpr int64_t kGrainElements = 8192;

void gated_activation(Tensor x, Tensor y, Gate gate) {
  Checker check("gated_activation");
  check.tensor("x", x, {DType::f32, DType::bf16}, {"T", "width"});
  check.require(x.size(1) % 2 == 0, "x has shape ", x, ", expected [T, 2I] with an even last size");
  check.bind("I", x.size(1) / 2, "x");
  check.tensor("out", y, {x.dtype}, {"T", "I"});
  const GatedActivationParams p{.x = x.data,
                                .y = y.data,
                                .T = check["T"],
                                .I = check["I"],
                                .x_t = x.stride(0),
                                .y_t = y.stride(0),
                                .gate = gate,
                                .dtype = x.dtype};
  if (p.T * p.I == 0) return;
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(gated_activation), p, x)) return;
  const auto run = kernel.pick();
  parallel_for(p.T, kGrainElements / p.I, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(gated_activation) {
  py::enum_<Gate>(m, "Gate").value("silu", Gate::silu).value("gpt_oss", Gate::gpt_oss);
  m.def("gated_activation", recordable(&gated_activation), ReleaseGil(), py::arg("x"), py::arg("y"),
        py::arg("gate"));
}

}  // namespace ivr
