#include <map>

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

std::vector<Binding::Fn>& bindings() {
  static std::vector<Binding::Fn> list;
  return list;
}

void count_flash_attention([[maybe_unused]] std::map<std::string, uint64_t>& counts,
                           [[maybe_unused]] bool reset) {
#if defined(IVR_CUDA)
  for (int i = 0; i < kAttentionVariants; ++i) {
    std::atomic<uint64_t>& launches = cuda::flash_attention_launches[i];
    const char* name = name_of(static_cast<AttentionVariant>(i));
    if (launches) counts[std::string("flash_attention/") + name] = launches;
    if (reset) launches = 0;
  }
#endif
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
            if (k->count(isa)) counts[std::string(k->name()) + "/" + name_of(isa)] = k->count(isa);
          }
          if (reset) k->reset();
        }
        count_flash_attention(counts, reset);
        return counts;
      },
      py::arg("reset"));
}

}  // namespace ivr
