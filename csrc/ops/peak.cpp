#include "kernels/peak.h"

#include <atomic>

#include "csrc/bind.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(products_f32, "peak_products_f32", peak_products);
IVR_CPU_KERNEL_OBJECT_BF16(products_bf16, "peak_products_bf16", peak_products, peak_products_dot,
                           peak_products_amx);
IVR_CPU_KERNEL_OBJECT(read_kernel, "peak_read", peak_read);

constexpr int64_t kPiece = int64_t{1} << 20;  // floats that a thread reads at a time

int64_t peak_products(bool bf16, int64_t rounds) {
  const auto run = (bf16 ? products_bf16 : products_f32).pick();
  std::atomic<int64_t> all{0};
  const int64_t threads = num_threads();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t operations = 0;
      float sink = 1.0f;
      run(rounds, operations, sink);
      all += operations;
    }
  });
  return all;
}

void peak_read(Tensor data) {
  Checker check("peak_read");
  check.tensor("data", data, {DType::f32}, {"N"});
  const auto run = read_kernel.pick();
  const float* base = static_cast<const float*>(data.data);
  const int64_t pieces = check["N"] / kPiece;
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    float sink = 0.0f;
    for (int64_t i = begin; i < end; ++i) run(base + i * kPiece, kPiece, sink);
  });
}

}  // namespace

IVR_BIND(peak) {
  m.def("peak_products", &peak_products, ReleaseGil(), py::arg("bf16"), py::arg("rounds"));
  m.def("peak_read", &peak_read, ReleaseGil(), py::arg("data"));
}

}  // namespace ivr
