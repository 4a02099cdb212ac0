#include "kernels/linear.h"

#include <algorithm>

#include "csrc/bind.h"
#include "csrc/cuda.h"
#include "csrc/linear.h"
#include "csrc/scratch.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel_f32, "linear_f32", linear);
IVR_CPU_KERNEL_OBJECT_BF16(kernel_bf16, "linear_bf16", linear, linear_dot, linear_amx);
IVR_CPU_KERNEL_OBJECT_BF16(kernel_codes, "linear_codes", linear_codes, linear_codes,
                           linear_codes_amx);
IVR_CPU_KERNEL_OBJECT(pack_kernel, "pack_panel", pack_panel);
IVR_CPU_KERNEL_OBJECT(quantise_kernel, "quantise_panel", quantise_panel);

const void* at_row(const void* base, int64_t row, int64_t stride, DType dtype) {
  return base ? static_cast<const char*>(base) + row * stride * static_cast<int64_t>(size_of(dtype))
              : nullptr;
}

void run(const LinearParams& whole, LinearSteps steps) {
  thread_local Scratch workspace;
  const int64_t row_bytes = std::max<int64_t>(whole.K * 4, 1);
  const int64_t passes = (whole.M * row_bytes + kWorkspaceBytes - 1) / kWorkspaceBytes;
  const int64_t rows = (whole.M + passes - 1) / std::max<int64_t>(passes, 1);
  const int64_t step = (rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  const bool serial = 2 * whole.M * whole.N * whole.K < kSerialFlops;
  for (int64_t m = 0; m < whole.M; m += step) {
    LinearParams p = whole;
    p.M = std::min(step, whole.M - m);
    p.x = at_row(whole.x, m, whole.x_m, whole.dtype);
    p.residual = at_row(whole.residual, m, whole.residual_m, whole.out_dtype);
    p.out = const_cast<void*>(at_row(whole.out, m, whole.out_m, whole.out_dtype));
    steps.plan(p, serial ? 1 : num_threads());
    p.workspace = workspace.reserve(p.workspace_size);
    if (p.items > 0) {
      const int64_t grain = kPrepareElements * p.items / std::max<int64_t>(p.M * p.K, 1) + 1;
      parallel_for(p.items, grain,
                   [&](int64_t begin, int64_t end) { steps.prepare(p, begin, end); });
    }
    const int64_t chunks = p.row_blocks * p.panel_blocks;
    parallel_for(chunks, serial ? chunks : 1, [&](int64_t begin, int64_t end) {
      steps.compute(p, begin, end, thread_scratch(p.scratch_size / 4 + 1));
    });
  }
}

// Whether weights may be given as pointers to their rows.
bool reads_rows(WeightFormat format) {
  return format == WeightFormat::bf16 && current_isa() >= Isa::avx512_bf16;
}

void linear(Tensor x, Tensor weight, int64_t N, int64_t K, WeightFormat format,
            std::optional<Tensor> bias, Activation activation, std::optional<Tensor> residual,
            std::optional<Tensor> scale, std::optional<bool> decode, Tensor out) {
  Checker check("linear");
  check.require(!is_gated(activation), "activation is a gate, allowed: none, gelu, silu");
  LinearParams p = product_of(check, x, weight, N, K, format);
  if (x.dtype == DType::bf16) {
    check.tensor("out", out, {DType::bf16, DType::f32}, {"M", "N"});
  } else {
    check.tensor("out", out, {DType::f32}, {"M", "N"});
  }
  if (bias) check.tensor("bias", *bias, {x.dtype}, {"N"});
  if (scale) check.tensor("scale", *scale, {x.dtype}, {"N"});
  if (residual) check.tensor("residual", *residual, {out.dtype}, {"M", "N"});
  check.apart("out", out, "x", x);
  p.bias = bias ? bias->data : nullptr;
  p.residual = residual ? residual->data : nullptr;
  p.scale = scale ? scale->data : nullptr;
  p.out = out.data;
  p.residual_m = residual ? residual->stride(0) : 0;
  p.out_m = out.stride(0);
  p.activation = activation;
  p.out_dtype = out.dtype;
  p.decode = decode.value_or(p.M <= kDecodeRows);
  if (p.M * p.N == 0) return;
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(linear), p, x)) return;
  run_on_cpu(p);
}

// The rows of several weights one after the other, packed into data; gated: those of the second
// half in turns with those of the first.
void pack(std::vector<Tensor> weights, WeightFormat format, bool gated, Tensor data) {
  Checker check("pack");
  check.require(!weights.empty(), "got no weight, expected at least one");
  check.require(format != WeightFormat::fp8,
                "weight format is not implemented, available: f32, bf16, int8, int4");
  const bool quantised = is_quantised(format);
  const DType dtype = format == WeightFormat::f32                   ? DType::f32
                      : quantised && weights[0].dtype == DType::f32 ? DType::f32
                                                                    : DType::bf16;
  std::vector<const void*> rows;
  int64_t i = 0;
  for (const Tensor& w : weights) {
    const std::string n = "N" + std::to_string(i++);
    check.tensor("weight", w, {dtype}, {n.c_str(), "K"});
    for (int64_t r = 0; r < w.size(0); ++r) rows.push_back(at_row(w.data, r, w.stride(0), dtype));
  }
  const int64_t K = check["K"], N = static_cast<int64_t>(rows.size());
  const int64_t panels = panel_count(N), size = panel_size(format, K);
  check.bind("P", panels * size, "packed size");
  const DType stored = quantised ? DType::u8 : dtype;
  check.tensor("data", data, {stored}, {"P"});
  if (panels * size == 0) return;
  require_cpu(check, data);
  if (gated) {
    check.require(N % kPanelColumns == 0, "a gated weight has N=", N, ", expected a multiple of ",
                  kPanelColumns);
    const std::vector<const void*> plain = rows;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t column = n % kPanelColumns, row = n / kPanelColumns * kGateColumns;
      rows[n] = plain[row + column + (column < kGateColumns ? 0 : N / 2 - kGateColumns)];
    }
  }
  rows.resize(panels * kPanelColumns, nullptr);
  const auto pack_one = quantised ? nullptr : pack_kernel.pick();
  const auto quantise_one = quantised ? quantise_kernel.pick() : nullptr;
  std::atomic<bool> all_finite = true;
  parallel_for(panels, kPrepareElements / size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const void* const* from = rows.data() + j * kPanelColumns;
      void* to = const_cast<void*>(at_row(data.data, j, size, stored));
      bool finite = true;
      if (quantised) {
        quantise_one(from, K, dtype, format, to, finite);
      } else {
        pack_one(from, K, format, to);
      }
      if (!finite) all_finite = false;
    }
  });
  check.require(all_finite, "a weight is NaN or infinite, ",
                format == WeightFormat::int8 ? "int8" : "int4", " needs finite ones");
}

}  // namespace

LinearParams product_of(Checker& check, const Tensor& x, const Tensor& weight, int64_t N, int64_t K,
                        WeightFormat format) {
  check.tensor("x", x, {DType::f32, DType::bf16}, {"M", "K"});
  check.require(check["K"] == K, "x has shape ", x, ", expected [M, K=", K, "] (K from weight [", N,
                ", ", K, "])");
  check.require(N >= 0, "weight has N=", N, ", expected N >= 0");
  check.require(format != WeightFormat::fp8,
                "weight format is not implemented, available: f32, bf16, int8, int4");
  const DType dtype = is_quantised(format)          ? DType::u8
                      : format == WeightFormat::f32 ? DType::f32
                                                    : DType::bf16;
  check.require(x.dtype == dtype || is_quantised(format), "x is ", name_of(x.dtype),
                ", expected the weight's ", name_of(dtype));
  check.require(x.device == Device::cpu || !is_quantised(format),
                "quantised weights are for the CPU, x is on a CUDA device");
  check.bind("P", x.device == Device::cuda ? N * K : panel_count(N) * panel_size(format, K),
             "packed size");
  check.bind("N", N, "weight");
  const bool in_place = weight.dtype == DType::i64;
  if (in_place) {
    check.require(reads_rows(format), "weight is not packed, and this instruction set reads none");
    check.bind("R", (panel_count(N) + 1) * kPanelColumns, "row pointers");
    check.tensor("weight", weight, {DType::i64}, {"R"});
  } else {
    check.tensor("weight", weight, {dtype}, {"P"});
  }
  LinearParams p{};
  p.x = x.data;
  p.weight = in_place ? nullptr : weight.data;
  p.rows = in_place ? static_cast<const void* const*>(weight.data) : nullptr;
  p.M = check["M"];
  p.N = N;
  p.K = K;
  p.x_m = x.stride(0);
  p.dtype = x.dtype;
  p.format = format;
  return p;
}

void run_on_cpu(const LinearParams& p) { run(p, linear_steps(p.dtype, p.format)); }

LinearSteps linear_steps(DType dtype, WeightFormat format) {
  LinearSteps steps;
  auto& kernel = dtype == DType::f32    ? kernel_f32
                 : is_quantised(format) ? kernel_codes
                                        : kernel_bf16;
  kernel.pick()(steps);
  return steps;
}

IVR_BIND(linear) {
  py::enum_<WeightFormat>(m, "WeightFormat")
      .value("f32", WeightFormat::f32)
      .value("bf16", WeightFormat::bf16)
      .value("int8", WeightFormat::int8)
      .value("int4", WeightFormat::int4)
      .value("fp8", WeightFormat::fp8);
  py::enum_<Activation>(m, "Activation")
      .value("none", Activation::none)
      .value("gelu", Activation::gelu)
      .value("silu", Activation::silu)
      .value("swiglu", Activation::swiglu)
      .value("swiglu_gpt_oss", Activation::swiglu_gpt_oss);
  m.def("linear", recordable(&linear), ReleaseGil(), py::arg("x"), py::arg("weight"), py::arg("N"),
        py::arg("K"), py::arg("format"), py::arg("bias"), py::arg("activation"),
        py::arg("residual"), py::arg("scale"), py::arg("decode"), py::arg("out"));
  m.def("pack", &pack, ReleaseGil(), py::arg("weights"), py::arg("format"), py::arg("gated"),
        py::arg("data"));
  m.def("reads_rows", &reads_rows);
  m.def("packed_size", [](int64_t N, int64_t K, WeightFormat format) {
    return panel_count(N) * panel_size(format, K);
  });
}

}  // namespace ivr
