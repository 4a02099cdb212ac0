#include "kernels/moe_route.h"

#include <vector>

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "moe_route", moe_route);

constexpr int64_t kGrainElements = 8192;

// A counting sort by expert, stable: a few operations per assignment.
void sort(const MoeRouteParams& p) {
  thread_local std::vector<int32_t> next;
  next.assign(p.E + 1, 0);
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t j = 0; j < p.k; ++j) ++next[p.ids[t * p.ids_t + j] + 1];
  }
  for (int64_t e = 0; e < p.E; ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e <= p.E; ++e) p.offsets[e] = next[e];
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t j = 0; j < p.k; ++j) {
      const int32_t place = next[p.ids[t * p.ids_t + j]]++;
      p.tokens[place] = static_cast<int32_t>(t);
      p.places[t * p.places_t + j] = place;
    }
  }
}

void moe_route(Tensor logits, int64_t top_k, bool normalize, Tensor ids, Tensor weights,
               Tensor tokens, Tensor places, Tensor offsets) {
  Checker check("moe_route");
  check.tensor("logits", logits, {DType::f32, DType::bf16}, {"T", "E"});
  const int64_t T = check["T"], E = check["E"];
  check.require(top_k >= 1 && top_k <= E, "top_k is ", top_k, ", allowed: 1 to the E = ", E,
                " experts");
  check.require(T * top_k <= INT32_MAX && E < INT32_MAX,
                "more than 2^31 assignments, expected fewer tokens");
  check.bind("k", top_k, "top_k");
  check.bind("M", T * top_k, "T * top_k");
  check.bind("E+1", E + 1, "logits");
  check.tensor("ids", ids, {DType::i32}, {"T", "k"});
  check.tensor("weights", weights, {DType::f32}, {"T", "k"});
  check.tensor("tokens", tokens, {DType::i32}, {"M"});
  check.tensor("places", places, {DType::i32}, {"T", "k"});
  check.tensor("offsets", offsets, {DType::i32}, {"E+1"});
  const MoeRouteParams p{.logits = logits.data,
                         .ids = static_cast<int32_t*>(ids.data),
                         .weights = static_cast<float*>(weights.data),
                         .tokens = static_cast<int32_t*>(tokens.data),
                         .places = static_cast<int32_t*>(places.data),
                         .offsets = static_cast<int32_t*>(offsets.data),
                         .T = T,
                         .E = E,
                         .k = top_k,
                         .logits_t = logits.stride(0),
                         .ids_t = ids.stride(0),
                         .weights_t = weights.stride(0),
                         .places_t = places.stride(0),
                         .normalize = normalize,
                         .dtype = logits.dtype};
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(moe_route), p, logits)) return;
  if (T > 0) {
    const auto run = kernel.pick();
    parallel_for(T, kGrainElements / E, [&](int64_t begin, int64_t end) { run(p, begin, end); });
  }
  sort(p);
}

}  // namespace

IVR_BIND(moe_route) {
  m.def("moe_route", recordable(&moe_route), ReleaseGil(), py::arg("logits"), py::arg("top_k"),
        py::arg("normalize"), py::arg("ids"), py::arg("weights"), py::arg("tokens"),
        py::arg("places"), py::arg("offsets"));
}

}  // namespace ivr
