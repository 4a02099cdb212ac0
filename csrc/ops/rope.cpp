#include "kernels/rope.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "rope", rope);

// Tokens below this many elements are not worth waking a thread for.
constexpr int64_t kGrainElements = 16384;

void rope(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor inv_freq, Tensor scale,
          Tensor sequence, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor out) {
  Checker check("rope");
  check.tensor("q", q, {DType::f32, DType::bf16}, {"T", "H", "D"});
  check.tensor("k", k, {q.dtype}, {"T", "K", "D"});
  check.tensor("v", v, {q.dtype}, {"T", "K", "D"});
  check.tensor("positions", positions, {DType::f32}, {"T"});
  check.tensor("inv_freq", inv_freq, {DType::f32}, {"B", "R/2"});
  check.tensor("scale", scale, {DType::f32}, {"B"});
  check.tensor("sequence", sequence, {DType::i32}, {"T"});
  check.tensor("k_cache", k_cache, {q.dtype}, {"pages", "K", "P", "D"});
  check.tensor("v_cache", v_cache, {q.dtype}, {"pages", "K", "P", "D"});
  check.tensor("slots", slots, {DType::i64}, {"T"});
  check.tensor("out", out, {q.dtype}, {"T", "H", "D"});
  const int64_t T = check["T"], H = check["H"], K = check["K"], D = check["D"], B = check["B"];
  const int64_t half = check["R/2"], P = check["P"], places = check["pages"] * P;
  check.require(D <= kRopeMaxDim, "head dim D is ", D, ", at most ", kRopeMaxDim, " allowed");
  check.require(2 * half <= D, "inv_freq has R/2 = ", half, " columns, at most D/2 = ", D / 2,
                " allowed");
  const RopeParams p{.q = q.data,
                     .k = k.data,
                     .v = v.data,
                     .positions = static_cast<const float*>(positions.data),
                     .inv_freq = static_cast<const float*>(inv_freq.data),
                     .scale = static_cast<const float*>(scale.data),
                     .sequence = static_cast<const int32_t*>(sequence.data),
                     .slots = static_cast<const int64_t*>(slots.data),
                     .k_cache = k_cache.data,
                     .v_cache = v_cache.data,
                     .out = out.data,
                     .T = T,
                     .H = H,
                     .K = K,
                     .P = P,
                     .D = D,
                     .B = B,
                     .places = places,
                     .half = half,
                     .q_t = q.stride(0),
                     .q_h = q.stride(1),
                     .k_t = k.stride(0),
                     .k_h = k.stride(1),
                     .v_t = v.stride(0),
                     .v_h = v.stride(1),
                     .inv_freq_b = inv_freq.stride(0),
                     .out_t = out.stride(0),
                     .out_h = out.stride(1),
                     .k_page = k_cache.stride(0),
                     .k_cache_h = k_cache.stride(1),
                     .k_p = k_cache.stride(2),
                     .v_page = v_cache.stride(0),
                     .v_cache_h = v_cache.stride(1),
                     .v_p = v_cache.stride(2),
                     .dtype = q.dtype};
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(rope), p, q)) return;
  for (int64_t t = 0; t < T; ++t) {
    if (p.sequence[t] < 0 || p.sequence[t] >= B) {
      check.fail("sequence[" + std::to_string(t) + "] is " + std::to_string(p.sequence[t]) +
                 ", allowed: 0 to " + std::to_string(B - 1) + " (rows of inv_freq)");
    }
    if (p.slots[t] >= places) {
      check.fail("slots[" + std::to_string(t) + "] is " + std::to_string(p.slots[t]) +
                 ", expected less than pages * P = " + std::to_string(places));
    }
  }
  if (T * D == 0) return;
  const auto run = kernel.pick();
  const int64_t elements = (H + 2 * K) * D;
  parallel_for(T, kGrainElements / (elements + 1) + 1,
               [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(rope) {
  m.def("rope", recordable(&rope), ReleaseGil(), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("positions"), py::arg("inv_freq"), py::arg("scale"), py::arg("sequence"),
        py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"), py::arg("out"));
}

}  // namespace ivr
