#include "kernels/grouped_linear.h"

#include <string.h>

#include <algorithm>
#include <vector>

#include "csrc/bind.h"
#include "csrc/cuda.h"
#include "csrc/linear.h"
#include "csrc/scratch.h"

namespace ivr {
namespace {

template <class T>
T* advance(T* base, int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return base ? static_cast<Byte*>(base) + elements * static_cast<int64_t>(size_of(dtype))
              : nullptr;
}

// Products of several experts that run together. Their work, laid end to end, is one range:
// item_ends and chunk_ends say where each product's part of it ends.
struct Batch {
  std::vector<LinearParams> products;
  std::vector<int64_t> item_ends, chunk_ends;
  int64_t first_row = 0, rows = 0;  // of the call

  void clear(int64_t row) {
    products.clear();
    first_row = row;
    rows = 0;
  }
};

// Calls f(product, begin, end) for the parts of [begin, end) that belong to each product.
template <class F>
void for_products(const Batch& batch, const std::vector<int64_t>& ends, int64_t begin, int64_t end,
                  F&& f) {
  int64_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
  while (begin < end) {
    const int64_t first = i > 0 ? ends[i - 1] : 0, stop = std::min(end, ends[i]);
    f(batch.products[i], begin - first, stop - first);
    begin = stop;
    ++i;
  }
}

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The rows of the batch, copied out of x one behind the other.
void gather(const GroupedLinearParams& g, const Batch& batch, void* to) {
  const int64_t size = g.K * static_cast<int64_t>(size_of(g.dtype));
  if (size == 0) return;
  parallel_for(batch.rows, kPrepareElements / g.K + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = g.rows[batch.first_row + i];
      memcpy(static_cast<char*>(to) + i * size, advance(g.x, row * g.x_r, g.dtype),
             static_cast<size_t>(size));
    }
  });
}

void run(const GroupedLinearParams& g, LinearSteps steps, Batch& batch) {
  thread_local Scratch workspace;
  if (batch.rows == 0) return;
  const bool serial = 2 * batch.rows * g.N * g.K < kSerialFlops;
  // Chunks of all products together feed the threads.
  const int64_t count = static_cast<int64_t>(batch.products.size());
  const int threads = serial ? 1 : static_cast<int>((num_threads() + count - 1) / count);
  const int64_t copied =
      g.rows ? aligned(batch.rows * g.K * static_cast<int64_t>(size_of(g.dtype))) : 0;
  int64_t bytes = copied, items = 0, chunks = 0, scratch = 0;
  batch.item_ends.clear();
  batch.chunk_ends.clear();
  for (LinearParams& p : batch.products) {
    steps.plan(p, threads);
    bytes += aligned(p.workspace_size);
    batch.item_ends.push_back(items += p.items);
    batch.chunk_ends.push_back(chunks += p.row_blocks * p.panel_blocks);
    scratch = std::max(scratch, p.scratch_size);
  }
  char* memory = static_cast<char*>(workspace.reserve(bytes));
  char* prepared = memory + copied;
  for (LinearParams& p : batch.products) {
    p.workspace = prepared;
    prepared += aligned(p.workspace_size);
  }
  if (g.rows) {
    gather(g, batch, memory);
    const char* x = memory;
    for (LinearParams& p : batch.products) {
      p.x = x;
      p.x_m = g.K;
      x += p.M * g.K * static_cast<int64_t>(size_of(g.dtype));
    }
  }
  const int64_t elements = std::max<int64_t>(batch.rows * g.K, 1);
  parallel_for(items, kPrepareElements * items / elements + 1, [&](int64_t begin, int64_t end) {
    for_products(batch, batch.item_ends, begin, end, steps.prepare);
  });
  parallel_for(chunks, serial ? chunks : 1, [&](int64_t begin, int64_t end) {
    float* sums = thread_scratch(scratch / 4 + 1);
    for_products(batch, batch.chunk_ends, begin, end,
                 [&](const LinearParams& p, int64_t first, int64_t last) {
                   steps.compute(p, first, last, sums);
                 });
  });
}

// Rows [m, m + M) of the call, all of expert e.
LinearParams product(const GroupedLinearParams& g, int64_t e, int64_t m, int64_t M) {
  LinearParams p{};
  p.x = g.rows ? nullptr : advance(g.x, m * g.x_r, g.dtype);
  p.weight = static_cast<const char*>(g.weight) + e * panel_count(g.N) * panel_bytes(g.format, g.K);
  p.bias = advance(g.bias, e * g.bias_e, g.dtype);
  p.out = advance(g.out, m * g.out_m, g.dtype);
  p.M = M;
  p.N = g.N;
  p.K = g.K;
  p.x_m = g.x_r;
  p.out_m = g.out_m;
  p.activation = g.activation;
  p.dtype = p.out_dtype = g.dtype;
  p.format = g.format;
  return p;
}

void run(const GroupedLinearParams& g, LinearSteps steps) {
  thread_local Batch batch;
  const int64_t row_bytes = std::max<int64_t>(g.K * 4, 1) * (g.rows ? 2 : 1);
  const int64_t most =
      std::max(kRowMultiple, kWorkspaceBytes / row_bytes / kRowMultiple * kRowMultiple);
  batch.clear(0);
  for (int64_t e = 0; e < g.E; ++e) {
    for (int64_t m = g.offsets[e]; m < g.offsets[e + 1]; m += most) {
      const int64_t M = std::min(most, g.offsets[e + 1] - m);
      if (batch.rows + M > most) {
        run(g, steps, batch);
        batch.clear(m);
      }
      batch.products.push_back(product(g, e, m, M));
      batch.rows += M;
    }
  }
  run(g, steps, batch);
}

void check_rows(const Checker& check, const GroupedLinearParams& g) {
  for (int64_t m = 0; g.rows && m < g.M; ++m) {
    if (g.rows[m] >= 0 && g.rows[m] < g.R) continue;
    check.fail("rows[" + std::to_string(m) + "] is " + std::to_string(g.rows[m]) +
               ", expected 0 to less than the R = " + std::to_string(g.R) + " rows of x");
  }
}

// gate: behind the products of experts whose weights are gated.
void grouped_linear(Tensor x, Tensor weight, int64_t E, int64_t N, int64_t K, WeightFormat format,
                    Tensor offsets, std::optional<Tensor> rows, std::optional<Tensor> bias,
                    std::optional<Gate> gate, std::optional<bool> decode, Tensor out) {
  Checker check(gate ? "grouped_gated_linear" : "grouped_linear");
  check.require(!gate || N % kPanelColumns == 0, "a gated weight has N=", N,
                ", expected a multiple of ", kPanelColumns);
  check.require(format != WeightFormat::fp8,
                "weight format is not implemented, available: f32, bf16, int8, int4");
  check.require(x.device == Device::cpu || !is_quantised(format),
                "quantised weights are for the CPU, x is on a CUDA device");
  check.require(E >= 0 && N >= 0 && K >= 0, "weight has a negative size");
  check.bind("K", K, "weight");
  check.bind("N", N, "weight");
  check.bind("E", E, "weight");
  check.bind("E+1", E + 1, "weight");
  const int64_t size = x.device == Device::cuda ? N * K : panel_count(N) * panel_size(format, K);
  check.bind("P", E * size, "packed size");
  if (is_quantised(format)) {
    check.tensor("weight", weight, {DType::u8}, {"P"});
    check.tensor("x", x, {DType::f32, DType::bf16}, {"R", "K"});
  } else {
    const DType stored = format == WeightFormat::f32 ? DType::f32 : DType::bf16;
    check.tensor("weight", weight, {stored}, {"P"});
    check.tensor("x", x, {stored}, {"R", "K"});
  }
  const DType dtype = x.dtype;
  if (rows) {
    check.tensor("rows", *rows, {DType::i32}, {"M"});
  } else {
    check.bind("M", check["R"], "x");
  }
  check.tensor("offsets", offsets, {DType::i32}, {"E+1"});
  if (bias) check.tensor("bias", *bias, {dtype}, {"E", "N"});
  check.bind("I", N / 2, "weight");
  check.tensor("out", out, {dtype}, {"M", gate ? "I" : "N"});
  check.apart("out", out, "x", x);
  const GroupedLinearParams g{.x = x.data,
                              .rows = rows ? static_cast<const int32_t*>(rows->data) : nullptr,
                              .weight = weight.data,
                              .bias = bias ? bias->data : nullptr,
                              .offsets = static_cast<const int32_t*>(offsets.data),
                              .out = out.data,
                              .R = check["R"],
                              .M = check["M"],
                              .N = N,
                              .K = K,
                              .E = E,
                              .x_r = x.stride(0),
                              .bias_e = bias ? bias->stride(0) : 0,
                              .out_m = out.stride(0),
                              .activation = gate ? epilogue_of(*gate) : Activation::none,
                              .dtype = dtype,
                              .format = format,
                              .decode = decode.value_or(check["M"] <= kDecodeRows)};
  if (!gate && ran_on_cuda(check, IVR_CUDA_KERNEL(grouped_linear), g, x)) return;
  require_cpu(check, x);
  check_offsets(check, "offsets", offsets, "M");
  check_rows(check, g);
  if (g.M * g.N == 0) return;
  run(g, linear_steps(dtype, format));
}

}  // namespace

IVR_BIND(grouped_linear) {
  m.def("grouped_linear", recordable(&grouped_linear), ReleaseGil(), py::arg("x"),
        py::arg("weight"), py::arg("E"), py::arg("N"), py::arg("K"), py::arg("format"),
        py::arg("offsets"), py::arg("rows"), py::arg("bias"), py::arg("gate"), py::arg("decode"),
        py::arg("out"));
}

}  // namespace ivr
