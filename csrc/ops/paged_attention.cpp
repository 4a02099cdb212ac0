#include "kernels/paged_attention.h"

#include <algorithm>

#include "csrc/attention.h"
#include "csrc/bind.h"
#include "csrc/cuda.h"
#include "csrc/scratch.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel_f32, "paged_attention", paged_attention);
IVR_CPU_KERNEL_OBJECT_BF16(kernel_bf16, "paged_attention", paged_attention, paged_attention,
                           paged_attention);

// Lengths within the table and every page that will be read within the cache.
void check_pages(const Checker& check, const PagedAttentionParams& p, int64_t pages, int64_t P) {
  const int64_t max_pages = check["max_pages"];
  for (int64_t b = 0; b < check["B"]; ++b) {
    const int64_t length = p.kv_lens[b], queries = p.a.cu_q[b + 1] - p.a.cu_q[b];
    if (length < queries || length > max_pages * P) {
      check.fail("kv_lens[" + std::to_string(b) + "] is " + std::to_string(length) +
                 ", allowed: from its " + std::to_string(queries) +
                 " queries to max_pages * P = " + std::to_string(max_pages * P));
    }
    if (queries == 0) continue;
    // Pages that all queries have left behind may have been given away.
    const bool slides = p.a.window != kAttentionNoWindow && !(p.a.prefix && p.a.prefix[b] > 0);
    const int64_t first = slides ? std::max<int64_t>(0, length - queries + 1 - p.a.window) : 0;
    for (int64_t i = first / P; i * P < length; ++i) {
      const int32_t page = p.page_table[b * p.page_table_b + i];
      if (page >= 0 && page < pages) continue;
      check.fail("page_table[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
                 std::to_string(page) + ", allowed: 0 to " + std::to_string(pages - 1) +
                 " (kv_lens[" + std::to_string(b) + "] is " + std::to_string(length) + ")");
    }
  }
}

int64_t workspace_floats(const Checker& check, [[maybe_unused]] const PagedAttentionParams& p,
                         const Tensor& q) {
  check.require(q.device == Device::cuda, "a workspace is for tensors on a CUDA device");
#if defined(IVR_CUDA)
  return cuda::paged_attention_workspace(p);
#else
  require_cpu(check, q);
  return 0;
#endif
}

void paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor cu_q,
                     Tensor kv_lens, double scale, std::optional<int64_t> window,
                     std::optional<Tensor> sinks, std::optional<Tensor> prefix,
                     std::optional<Tensor> workspace, Tensor out) {
  Checker check("paged_attention");
  check.tensor("q", q, {DType::f32, DType::bf16}, {"T", "H", "D"});
  check.tensor("k_cache", k_cache, {q.dtype}, {"pages", "K", "P", "D"});
  check.tensor("v_cache", v_cache, {q.dtype}, {"pages", "K", "P", "D"});
  const AttentionOptions options{scale, true, window, sinks, prefix};
  const AttentionParams a = attention_params(check, q, out, cu_q, options);
  check.tensor("page_table", page_table, {DType::i32}, {"B", "max_pages"});
  check.tensor("kv_lens", kv_lens, {DType::i32}, {"B"});
  const int64_t P = check["P"];
  check.require(P >= 1 && (P & (P - 1)) == 0, "page size P is ", P, ", expected a power of two");
  int shift = 0;
  while ((int64_t{1} << shift) < P) ++shift;
  PagedAttentionParams p{.a = a,
                         .k_cache = k_cache.data,
                         .v_cache = v_cache.data,
                         .page_table = static_cast<const int32_t*>(page_table.data),
                         .kv_lens = static_cast<const int32_t*>(kv_lens.data),
                         .pages = check["pages"],
                         .max_pages = check["max_pages"],
                         .page_table_b = page_table.stride(0),
                         .k_page = k_cache.stride(0),
                         .k_h = k_cache.stride(1),
                         .k_p = k_cache.stride(2),
                         .v_page = v_cache.stride(0),
                         .v_h = v_cache.stride(1),
                         .v_p = v_cache.stride(2),
                         .page_shift = shift,
                         .workspace = nullptr};
  if (q.device == Device::cuda) {
    check_cuda_rows(check, p.a,
                    {{"q", &q}, {"k_cache", &k_cache}, {"v_cache", &v_cache}, {"out", &out}});
  }
  if (workspace) {
    check.bind("W", workspace_floats(check, p, q), "workspace size");
    check.tensor("workspace", *workspace, {DType::f32}, {"W"});
    p.workspace = static_cast<float*>(workspace->data);
  }
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(paged_attention), p, q)) return;
  check_offsets(check, "cu_q", cu_q, "T");
  check_pages(check, p, check["pages"], P);
  check_prefix(check, p.a, check["B"], [&](int64_t b) { return p.kv_lens[b]; });
  if (q.numel() == 0) return;

  const auto& items = attention_items(p.a, check["B"], check["K"]);
  const auto run = (q.dtype == DType::bf16 ? kernel_bf16 : kernel_f32).pick();
  parallel_for(static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
    run(p, items.data(), thread_scratch(attention_scratch(p.a.D)), begin, end);
  });
}

// Floats that a decode step of these shapes needs.
int64_t workspace_size(Tensor q, Tensor k_cache, Tensor page_table) {
  Checker check("paged_attention");
  check.tensor("q", q, {DType::f32, DType::bf16}, {"T", "H", "D"});
  check.tensor("k_cache", k_cache, {q.dtype}, {"pages", "K", "P", "D"});
  check.tensor("page_table", page_table, {DType::i32}, {"B", "max_pages"});
  check.require(check["K"] >= 1, "K is 0, expected at least one kv head");
  PagedAttentionParams p{};
  p.a.T = check["T"];
  p.a.K = check["K"];
  p.a.D = check["D"];
  p.a.group = check["H"] / p.a.K;
  p.a.dtype = q.dtype;
  p.max_pages = check["max_pages"] * check["P"];
  return workspace_floats(check, p, q);
}

}  // namespace

IVR_BIND(paged_attention) {
  m.def("paged_attention_workspace", &workspace_size, py::arg("q"), py::arg("k_cache"),
        py::arg("page_table"));
  m.def("paged_attention", recordable(&paged_attention), ReleaseGil(), py::arg("q"),
        py::arg("k_cache"), py::arg("v_cache"), py::arg("page_table"), py::arg("cu_q"),
        py::arg("kv_lens"), py::arg("scale"), py::arg("window"), py::arg("sinks"),
        py::arg("prefix"), py::arg("workspace"), py::arg("out"));
}

}  // namespace ivr
