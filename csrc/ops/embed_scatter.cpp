#include "kernels/embed_scatter.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "embed_scatter", embed_scatter);

void embed_scatter(Tensor ids, Tensor table, std::optional<Tensor> image,
                   std::optional<Tensor> image_row, Tensor out) {
  Checker check("embed_scatter");
  check.tensor("table", table, {DType::f32, DType::bf16}, {"V", "C"});
  check.tensor("ids", ids, {DType::i64}, {"T"});
  check.tensor("out", out, {table.dtype}, {"T", "C"});
  check.require(image.has_value() == image_row.has_value(),
                "image and image_row are given together or not at all");
  EmbedScatterParams p{.ids = static_cast<const int64_t*>(ids.data),
                       .image_row = nullptr,
                       .table = table.data,
                       .image = nullptr,
                       .out = out.data,
                       .T = check["T"],
                       .V = check["V"],
                       .N = 0,
                       .C = check["C"],
                       .table_v = table.stride(0),
                       .image_n = 0,
                       .out_t = out.stride(0),
                       .dtype = table.dtype};
  if (image) {
    check.tensor("image", *image, {table.dtype}, {"N", "C"});
    check.tensor("image_row", *image_row, {DType::i64}, {"T"});
    p.image = image->data;
    p.image_n = image->stride(0);
    p.image_row = static_cast<const int64_t*>(image_row->data);
    p.N = check["N"];
  }
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(embed_scatter), p, table)) return;
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t row = p.image_row ? p.image_row[t] : -1;
    if (row >= p.N) {
      check.fail("image_row[" + std::to_string(t) + "] is " + std::to_string(row) + ", image has " +
                 std::to_string(p.N) + " rows");
    }
    if (row < 0 && (p.ids[t] < 0 || p.ids[t] >= p.V)) {
      check.fail("ids[" + std::to_string(t) + "] is " + std::to_string(p.ids[t]) +
                 ", expected 0 to V-1=" + std::to_string(p.V - 1));
    }
  }
  if (p.T == 0 || p.C == 0) return;
  const auto run = kernel.pick();
  parallel_for(p.T, 65536 / p.C, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(embed_scatter) {
  m.def("embed_scatter", recordable(&embed_scatter), ReleaseGil(), py::arg("ids"), py::arg("table"),
        py::arg("image"), py::arg("image_row"), py::arg("out"));
}

}  // namespace ivr
