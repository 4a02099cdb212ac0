#include <map>

#include "csrc/bind.h"

namespace ivr {
namespace {

std::vector<Binding::Fn>& bindings() {
  static std::vector<Binding::Fn> list;
  return list;
}

}  // namespace

Binding::Binding(Fn fn) { bindings().push_back(fn); }

PYBIND11_MODULE(_C, m) {
  init_exchange_api();
  for (Binding::Fn bind : bindings()) bind(m);

#if defined(IVR_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("isa", [] { return std::string(name_of(current_isa())); });
  m.def("supported_isas", &supported_isas);
  m.def("force_isa", &force_isa);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);
  // {"rms_norm/avx512": calls since the last reset}
  m.def(
      "kernel_counts",
      [](bool reset) {
        std::map<std::string, uint64_t> counts;
        for (CpuKernelBase* k : CpuKernelBase::all()) {
          for (int i = 0; i < kIsaCount; ++i) {
            const Isa isa = static_cast<Isa>(i);
            if (k->count(isa)) counts[std::string(k->name()) + "/" + name_of(isa)] = k->count(isa);
          }
          if (reset) k->reset();
        }
        return counts;
      },
      py::arg("reset"));
}

}  // namespace ivr
