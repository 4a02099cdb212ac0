#include "csrc/bind.h"
#include "csrc/cuda.h"
#include "csrc/linear.h"

#if defined(IVR_CUDA)
#include "kernels/cuda/gemm_launchers.h"
#endif

namespace ivr {
namespace {

// Runs the product and its gate in one kernel where there is one: on the CPU for a gated weight, on
// a GPU where it has one for silu. False: there is none, and nothing was done.
bool gated_linear(Tensor x, Tensor weight, int64_t N, int64_t K, WeightFormat format, bool gated,
                  std::optional<Tensor> bias, Gate gate, std::optional<bool> decode, Tensor out) {
  if (!gated && (gate != Gate::silu || x.device == Device::cpu)) return false;
  Checker check("gated_linear");
  LinearParams p = product_of(check, x, weight, N, K, format);
  check.require(!gated || N % kPanelColumns == 0, "a gated weight has N=", N,
                ", expected a multiple of ", kPanelColumns);
  check.bind("I", N / 2, "weight");
  check.tensor("out", out, {x.dtype}, {"M", "I"});
  if (bias) check.tensor("bias", *bias, {x.dtype}, {"N"});
  check.apart("out", out, "x", x);
  p.bias = bias ? bias->data : nullptr;
  p.out = out.data;
  p.out_m = out.stride(0);
  p.activation = epilogue_of(gate);
  p.out_dtype = out.dtype;
  p.decode = decode.value_or(p.M <= kDecodeRows);
  if (p.M * p.N == 0) return true;
  if (gated) {
    require_cpu(check, x);
    run_on_cpu(p);
    return true;
  }
  bool taken = false;
#if defined(IVR_CUDA)
  const auto launch = [&taken](const LinearParams& params, cudaStream_t stream) {
    taken = cuda::gemm_on_device(params).has_value();
    return taken ? cuda::linear(params, stream) : cudaSuccess;
  };
  launch_cuda(check, launch, p, x);
#endif
  return taken;
}

}  // namespace

IVR_BIND(gated_linear) {
  m.def("gated_linear", recordable(&gated_linear), ReleaseGil(), py::arg("x"), py::arg("weight"),
        py::arg("N"), py::arg("K"), py::arg("format"), py::arg("gated"), py::arg("bias"),
        py::arg("gate"), py::arg("decode"), py::arg("out"));
}

}  // namespace ivr
