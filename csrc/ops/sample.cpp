#include "kernels/sample.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "sample", sample);

template <class T>
const T* row_parameter(Checker& check, const char* name, const std::optional<Tensor>& t,
                       DType dtype) {
  if (!t) return nullptr;
  check.tensor(name, *t, {dtype}, {"B"});
  return static_cast<const T*>(t->data);
}

void sample(Tensor logits, std::optional<Tensor> temperature, std::optional<Tensor> top_k,
            std::optional<Tensor> top_p, std::optional<Tensor> min_p,
            std::optional<Tensor> repetition_penalty, std::optional<Tensor> history,
            std::optional<Tensor> cu_history, std::optional<Tensor> seed,
            std::optional<Tensor> index, Tensor workspace, Tensor out) {
  Checker check("sample");
  check.tensor("logits", logits, {DType::f32}, {"B", "V"});
  const int64_t padded = (check["V"] + 3) / 4 * 4;
  check.bind("padded V", padded, "logits");
  check.tensor("workspace", workspace, {DType::f32}, {"B", "padded V"});
  check.tensor("out", out, {DType::i64}, {"B"});
  check.require(workspace.contiguous(), "workspace must be contiguous");
  check.require(history.has_value() == cu_history.has_value(),
                "history and cu_history are given together or not at all");
  SampleParams p{.logits = static_cast<const float*>(logits.data),
                 .temperature = row_parameter<float>(check, "temperature", temperature, DType::f32),
                 .top_k = row_parameter<int32_t>(check, "top_k", top_k, DType::i32),
                 .top_p = row_parameter<float>(check, "top_p", top_p, DType::f32),
                 .min_p = row_parameter<float>(check, "min_p", min_p, DType::f32),
                 .repetition_penalty = row_parameter<float>(check, "repetition_penalty",
                                                            repetition_penalty, DType::f32),
                 .history = nullptr,
                 .cu_history = nullptr,
                 .seed = row_parameter<int64_t>(check, "seed", seed, DType::i64),
                 .index = row_parameter<int64_t>(check, "index", index, DType::i64),
                 .workspace = static_cast<float*>(workspace.data),
                 .out = static_cast<int64_t*>(out.data),
                 .B = check["B"],
                 .V = check["V"],
                 .L = 0,
                 .logits_b = logits.stride(0),
                 .workspace_b = padded};
  const int64_t B = check["B"];
  if (history) {
    check.tensor("history", *history, {DType::i64}, {"L"});
    check.tensor("cu_history", *cu_history, {DType::i32}, {"B+1"});
    check.require(check["B+1"] == B + 1, "cu_history must have B + 1 entries");
    p.history = static_cast<const int64_t*>(history->data);
    p.cu_history = static_cast<const int32_t*>(cu_history->data);
    p.L = check["L"];
  }
  check.require(B == 0 || p.V > 0, "logits have no columns");
  if (ran_on_cuda(check, IVR_CUDA_KERNEL(sample), p, logits)) return;
  // Written so that NaN fails too.
  for (int64_t b = 0; b < B; ++b) {
    const std::string row = "[" + std::to_string(b) + "]";
    const auto refuse = [&](const char* name, double value, const char* allowed) {
      check.fail(name + row + " is " + std::to_string(value) + ", allowed: " + allowed);
    };
    if (p.temperature && !(p.temperature[b] >= 0 && p.temperature[b] < 1e30f)) {
      refuse("temperature", p.temperature[b], "a finite number >= 0");
    }
    if (p.top_k && p.top_k[b] < 0) refuse("top_k", p.top_k[b], "an integer >= 0");
    if (p.top_p && !(p.top_p[b] > 0 && p.top_p[b] <= 1)) refuse("top_p", p.top_p[b], "(0, 1]");
    if (p.min_p && !(p.min_p[b] >= 0 && p.min_p[b] <= 1)) refuse("min_p", p.min_p[b], "[0, 1]");
    if (p.repetition_penalty && !(p.repetition_penalty[b] > 0 && p.repetition_penalty[b] < 1e30f)) {
      refuse("repetition_penalty", p.repetition_penalty[b], "a finite number > 0");
    }
  }
  if (history) {
    check.require(p.cu_history[0] == 0 && p.cu_history[B] == p.L,
                  "cu_history must run from 0 to the length of history");
    for (int64_t b = 0; b < B; ++b) {
      check.require(p.cu_history[b] <= p.cu_history[b + 1], "cu_history must not decrease");
    }
    for (int64_t i = 0; i < p.L; ++i) {
      check.require(p.history[i] >= 0 && p.history[i] < p.V, "history[", i, "] is ", p.history[i],
                    ", expected 0 to V-1=", p.V - 1);
    }
  }
  if (B == 0) return;
  const auto run = kernel.pick();
  parallel_for(B, 1, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(sample) {
  m.def("sample", recordable(&sample), ReleaseGil(), py::arg("logits"), py::arg("temperature"),
        py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("repetition_penalty"),
        py::arg("history"), py::arg("cu_history"), py::arg("seed"), py::arg("index"),
        py::arg("workspace"), py::arg("out"));
}

}  // namespace ivr
