#include "kernels/moe_combine.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "moe_combine", moe_combine);

constexpr int64_t kGrainElements = 16384;

void check_places(const Checker& check, const MoeCombineParams& p) {
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t j = 0; j < p.k; ++j) {
      const int32_t place = p.places[t * p.places_t + j];
      if (place >= 0 && place < p.M) continue;
      check.fail("places[" + std::to_string(t) + ", " + std::to_string(j) + "] is " +
                 std::to_string(place) +
                 ", expected 0 to less than the M = " + std::to_string(p.M) + " rows of x");
    }
  }
}

void moe_combine(Tensor x, Tensor weights, Tensor places, std::optional<Tensor> residual,
                 Tensor out) {
  Checker check("moe_combine");
  check.tensor("x", x, {DType::f32, DType::bf16}, {"M", "N"});
  check.tensor("weights", weights, {DType::f32}, {"T", "k"});
  check.tensor("places", places, {DType::i32}, {"T", "k"});
  if (residual) check.tensor("residual", *residual, {x.dtype}, {"T", "N"});
  check.tensor("out", out, {x.dtype}, {"T", "N"});
  const MoeCombineParams p{.x = x.data,
                           .weights = static_cast<const float*>(weights.data),
                           .places = static_cast<const int32_t*>(places.data),
                           .residual = residual ? residual->data : nullptr,
                           .out = out.data,
                           .T = check["T"],
                           .M = check["M"],
                           .N = check["N"],
                           .k = check["k"],
                           .x_m = x.stride(0),
                           .weights_t = weights.stride(0),
                           .places_t = places.stride(0),
                           .residual_t = residual ? residual->stride(0) : 0,
                           .out_t = out.stride(0),
                           .dtype = x.dtype};
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(moe_combine), p, x)) return;
  check_places(check, p);
  if (p.T * p.N == 0) return;
  const auto run = kernel.pick();
  parallel_for(p.T, kGrainElements / (p.N * (p.k + 1)),
               [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(moe_combine) {
  m.def("moe_combine", recordable(&moe_combine), ReleaseGil(), py::arg("x"), py::arg("weights"),
        py::arg("places"), py::arg("residual"), py::arg("out"));
}

}  // namespace ivr
