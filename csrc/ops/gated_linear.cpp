#include "csrc/bind.h"
#include "csrc/cuda.h"
#include "csrc/linear.h"
#include "kernels/gated_activation.h"

#if defined(IVR_CUDA)
#include "kernels/cuda/gemm_launchers.h"
#endif

namespace ivr {
namespace {

// Runs the product and its gate in one kernel where the device of x has one for them. False: it has
// none, and nothing was done.
bool gated_linear(Tensor x, Tensor weight, int64_t N, int64_t K, WeightFormat format,
                  std::optional<Tensor> bias, Gate gate, std::optional<bool> decode, Tensor out) {
  if (x.device == Device::cpu || gate != Gate::silu) return false;
  Checker check("gated_linear");
  check.bind("K", K, "weight");
  check.tensor("x", x, {DType::f32, DType::bf16}, {"M", "K"});
  check.bind("P", N * K, "size of the weight");
  check.tensor("weight", weight, {x.dtype}, {"P"});
  check.bind("I", N / 2, "weight");
  check.tensor("out", out, {x.dtype}, {"M", "I"});
  check.bind("N", N, "weight");
  if (bias) check.tensor("bias", *bias, {x.dtype}, {"N"});
  LinearParams p{};
  p.x = x.data;
  p.weight = weight.data;
  p.bias = bias ? bias->data : nullptr;
  p.out = out.data;
  p.M = check["M"];
  p.N = N;
  p.K = K;
  p.x_m = x.stride(0);
  p.out_m = out.stride(0);
  p.activation = Activation::swiglu;
  p.dtype = x.dtype;
  p.out_dtype = out.dtype;
  p.format = format;
  p.decode = decode.value_or(p.M <= kDecodeRows);
  if (p.M * p.N == 0) return true;
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
        py::arg("N"), py::arg("K"), py::arg("format"), py::arg("bias"), py::arg("gate"),
        py::arg("decode"), py::arg("out"));
}

}  // namespace ivr
