#include <map>
#include <memory>

#include "csrc/bind.h"
#include "csrc/cuda.h"

#if defined(IVR_CUDA)
#include "kernels/cuda/gemm_launchers.h"
#endif

namespace ivr {
namespace {

std::vector<Binding::Fn>& bindings() {
  static std::vector<Binding::Fn> list;
  return list;
}

// What kernels with several variants on CUDA have launched.
void count_launches([[maybe_unused]] std::map<std::string, uint64_t>& counts,
                    [[maybe_unused]] bool reset) {
#if defined(IVR_CUDA)
  const auto take = [&](const std::string& name, std::atomic<uint64_t>& launches) {
    if (launches) counts[name] = launches;
    if (reset) launches = 0;
  };
  for (int i = 0; i < kAttentionVariants; ++i) {
    take(std::string("flash_attention/") + name_of(static_cast<AttentionVariant>(i)),
         cuda::flash_attention_launches[i]);
  }
  for (const cuda::GemmConfig& config : cuda::kGemms) {
    char name[64];
    cuda::format(config, name, sizeof(name));
    take(std::string("linear/") + name, cuda::gemm_launches[cuda::gemm_index(config)]);
  }
#endif
}

// The native calls in work(), noted and not made, and what it returned.
std::pair<std::unique_ptr<Tape>, py::object> record(const py::function& work) {
  struct Scope {
    explicit Scope(Tape* tape) { recording = tape; }
    ~Scope() { recording = nullptr; }
  };
  auto tape = std::make_unique<Tape>();
  const Scope scope(tape.get());
  py::object result = work();
  return {std::move(tape), std::move(result)};
}

// set_num_threads for Python: pybind11's own refusal takes several lines.
void take_num_threads(const py::object& n) {
  if (!PyIndex_Check(n.ptr()) || PyBool_Check(n.ptr())) {
    throw py::type_error(std::string("set_num_threads: got ") + Py_TYPE(n.ptr())->tp_name +
                         ", expected an integer");
  }
  const Py_ssize_t value = PyNumber_AsSsize_t(n.ptr(), nullptr);  // what does not fit is clipped
  if (PyErr_Occurred()) throw py::error_already_set();
  set_num_threads(value);
}

}  // namespace

thread_local Tape* recording = nullptr;

Binding::Binding(Fn fn) { bindings().push_back(fn); }

PYBIND11_MODULE(_C, m) {
  init_exchange_api();
  for (Binding::Fn bind : bindings()) bind(m);

#if defined(IVR_CUDA)
  m.attr("has_cuda") = true;
  m.attr("has_gemm") = cuda::has_gemms();  // the matrix products of Hopper
#else
  m.attr("has_cuda") = false;
  m.attr("has_gemm") = false;
#endif
  py::class_<Tape>(m, "Tape").def(
      "replay",
      [](const Tape& tape) {
        for (const auto& call : tape.calls) call();
      },
      ReleaseGil());
  m.def("record", &record, py::arg("work"));
  m.def("isa", [] { return std::string(name_of(current_isa())); });
  m.def("supported_isas", &supported_isas);
  m.def("force_isa", &force_isa);
  m.def("num_threads", &num_threads, "CPU threads that the kernels of this process share.");
  m.def("set_num_threads", &take_num_threads, py::arg("n"),
        "Sets the CPU threads of the whole process, 1 to 1024; results do not depend on them.");
#if defined(IVR_CUDA)
  // While on, Hopper runs the kernels of other devices.
  m.def("force_mma", &cuda::force_mma, py::arg("on"));
#endif
  // {"rms_norm/avx512": calls since the last reset, "flash_attention/wgmma": launches}
  m.def(
      "kernel_counts",
      [](bool reset) {
        std::map<std::string, uint64_t> counts;
        for (CpuKernelBase* k : CpuKernelBase::all()) {
          for (int i = 0; i < kIsaCount; ++i) {
            const Isa isa = static_cast<Isa>(i);
            if (k->count(isa)) counts[std::string(k->name()) + "/" + name_of(isa)] += k->count(isa);
          }
          if (reset) k->reset();
        }
        count_launches(counts, reset);
        return counts;
      },
      py::arg("reset"));
}

}  // namespace ivr
