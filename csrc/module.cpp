#include <map>

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

// The matrix products of Hopper that ran, by name.
void count_gemms([[maybe_unused]] std::map<std::string, uint64_t>& counts,
                 [[maybe_unused]] bool reset) {
#if defined(IVR_CUDA)
  for (const cuda::GemmConfig& config : cuda::kGemms) {
    char name[64];
    cuda::format(config, name, sizeof(name));
    std::atomic<uint64_t>& launches = cuda::gemm_launches[cuda::gemm_index(config)];
    if (launches) counts[std::string("linear/") + name] = launches;
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
  m.attr("has_gemm") = cuda::has_gemms();  // the matrix products of Hopper
#else
  m.attr("has_cuda") = false;
  m.attr("has_gemm") = false;
#endif
  m.def("isa", [] { return std::string(name_of(current_isa())); });
  m.def("supported_isas", &supported_isas);
  m.def("force_isa", &force_isa);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);
  // {"rms_norm/avx512": calls since the last reset}, and {"linear/gemm_gelu_128x128": launches}
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
        count_gemms(counts, reset);
        return counts;
      },
      py::arg("reset"));
}

}  // namespace ivr
