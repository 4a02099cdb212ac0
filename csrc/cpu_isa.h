// Which instruction set runs, and the record of what ran.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/isa.h"

namespace ivr {

const char* name_of(Isa isa);
bool is_supported(Isa isa);  // compiled in, on this CPU, allowed by the operating system
Isa current_isa();           // the best one, or the forced one
void force_isa(
    const std::string& name);  // "" goes back to the best; ValueError lists what is there
std::vector<std::string> supported_isas();

// One CPU kernel in all its variants. Counting what ran lets a test prove which variant it tested.
template <class Fn>
class CpuKernel;

class CpuKernelBase {
 public:
  explicit CpuKernelBase(const char* name);
  const char* name() const { return name_; }
  uint64_t count(Isa isa) const { return counts_[static_cast<int>(isa)].load(); }
  void reset() {
    for (auto& c : counts_) c = 0;
  }
  static const std::vector<CpuKernelBase*>& all();

 protected:
  const char* name_;
  std::atomic<uint64_t> counts_[kIsaCount] = {};
};

template <class... Args>
class CpuKernel<void(Args...)> : public CpuKernelBase {
 public:
  using Pointer = void (*)(Args...);
  // Variants in the order of Isa; null where an instruction set has none of its own.
  CpuKernel(const char* name, std::initializer_list<Pointer> variants) : CpuKernelBase(name) {
    int i = 0;
    for (Pointer v : variants) variants_[i++] = v;
  }
  // The variant of the current instruction set, or of the next lower one that has one.
  Pointer pick() {
    int i = static_cast<int>(current_isa());
    while (!variants_[i] && i > 0) {
      // What comes above AVX-512 are siblings: none stands in for the other.
      i = i > static_cast<int>(Isa::avx512) ? static_cast<int>(Isa::avx512) : i - 1;
    }
    counts_[i].fetch_add(1, std::memory_order_relaxed);
    return variants_[i];
  }

 private:
  Pointer variants_[kIsaCount] = {};
};

}  // namespace ivr

// In the order of Isa.
#if defined(IVR_X86)
#define IVR_PLAIN_VARIANTS(kernel) portable::kernel, nullptr, avx2::kernel, avx512::kernel
#define IVR_MORE_VARIANTS(dot_kernel, amx_kernel) \
  avx512_bf16::dot_kernel, amx_emulated::amx_kernel, amx::amx_kernel
#else
#if defined(IVR_ARM64)
#define IVR_PLAIN_VARIANTS(kernel) portable::kernel, neon::kernel
#else
#define IVR_PLAIN_VARIANTS(kernel) portable::kernel
#endif
#define IVR_MORE_VARIANTS(dot_kernel, amx_kernel)
#endif

// static auto& kernel = ...: a kernel object with the variants of one entry point.
#define IVR_CPU_KERNEL_OBJECT(object, label, kernel)                    \
  CpuKernel<std::remove_pointer_t<decltype(&portable::kernel)>> object( \
      label, {IVR_PLAIN_VARIANTS(kernel)})
#define IVR_CPU_KERNEL_OBJECT_BF16(object, label, kernel, dot_kernel, amx_kernel) \
  CpuKernel<std::remove_pointer_t<decltype(&portable::kernel)>> object(           \
      label, {IVR_PLAIN_VARIANTS(kernel), IVR_MORE_VARIANTS(dot_kernel, amx_kernel)})
