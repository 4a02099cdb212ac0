#include "kernels/flash_attention.h"

#include "csrc/attention.h"
#include "csrc/bind.h"
#include "csrc/cuda.h"
#include "csrc/scratch.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel_f32, "flash_attention", flash_attention);
IVR_CPU_KERNEL_OBJECT_BF16(kernel_bf16, "flash_attention", flash_attention, flash_attention,
                           flash_attention);

void flash_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_kv, double scale,
                     bool causal, std::optional<int64_t> window, std::optional<Tensor> sinks,
                     std::optional<Tensor> prefix, Tensor out) {
  Checker check("flash_attention");
  check.tensor("q", q, {DType::f32, DType::bf16}, {"T", "H", "D"});
  check.tensor("k", k, {q.dtype}, {"Tkv", "K", "D"});
  check.tensor("v", v, {q.dtype}, {"Tkv", "K", "D"});
  const AttentionOptions options{scale, causal, window, sinks, prefix};
  const FlashAttentionParams p{.a = attention_params(check, q, out, cu_q, options),
                               .k = k.data,
                               .v = v.data,
                               .cu_kv = static_cast<const int32_t*>(cu_kv.data),
                               .keys = check["Tkv"],
                               .k_t = k.stride(0),
                               .k_h = k.stride(1),
                               .v_t = v.stride(0),
                               .v_h = v.stride(1)};
  check.tensor("cu_kv", cu_kv, {DType::i32}, {"B+1"});
  if (q.device == Device::cuda) {
    check_cuda_rows(check, p.a, {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}});
  }
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(flash_attention), p, q)) return;
  check_offsets(check, "cu_q", cu_q, "T");
  check_offsets(check, "cu_kv", cu_kv, "Tkv");
  check_prefix(check, p.a, check["B"], [&](int64_t b) { return p.cu_kv[b + 1] - p.cu_kv[b]; });
  if (q.numel() == 0) return;

  const auto& items = attention_items(p.a, check["B"], check["K"]);
  const auto run = (q.dtype == DType::bf16 ? kernel_bf16 : kernel_f32).pick();
  parallel_for(static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
    run(p, items.data(), thread_scratch(attention_scratch(p.a.D)), begin, end);
  });
}

}  // namespace

IVR_BIND(flash_attention) {
  m.def("flash_attention", recordable(&flash_attention), ReleaseGil(), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("cu_q"), py::arg("cu_kv"), py::arg("scale"), py::arg("causal"),
        py::arg("window"), py::arg("sinks"), py::arg("prefix"), py::arg("out"));
}

}  // namespace ivr
