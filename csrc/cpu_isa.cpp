#include "csrc/cpu_isa.h"

#if defined(IVR_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>

namespace ivr {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable",    "neon",         "avx2", "avx512",
                                           "avx512_bf16", "amx_emulated", "amx"};

#if defined(IVR_X86)
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBf16 | kTile | kInt8;
  if ((d & kAll) != kAll) return false;
  // The tile registers are off until the process asks for them.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool detect(Isa isa) {
#if defined(IVR_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    case Isa::amx_emulated:
      return avx512;
    case Isa::amx:
      return avx512 && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni") && has_amx();
    default:
      return false;
  }
#elif defined(IVR_ARM64)
  return isa == Isa::portable || isa == Isa::neon;  // which every 64-bit Arm CPU has
#else
  return isa == Isa::portable;
#endif
}

// Software tiles exist for tests. AMD's cores (Zen 4 on) start a 512-bit dot product of pairs in
// every cycle, twice the multiply-adds of fp32 (235 against 117 GFLOP/s a core at 3.65 GHz);
// Intel's without usable tiles are faster in fp32 (Sapphire Rapids: 119 against 240). By maker and
// not by a measurement at start: the choice decides over a result's last bits.
bool is_worthwhile(Isa isa) {
#if defined(IVR_X86)
  if (isa == Isa::avx512_bf16) return __builtin_cpu_is("amd");
#endif
  return isa != Isa::amx_emulated;
}

Isa best_isa() {
  static const Isa best = [] {
    int i = kIsaCount - 1;
    while (!is_supported(static_cast<Isa>(i)) || !is_worthwhile(static_cast<Isa>(i))) --i;
    return static_cast<Isa>(i);
  }();
  return best;
}

std::atomic<int> forced{-1};

std::vector<CpuKernelBase*>& kernels() {
  static std::vector<CpuKernelBase*> list;
  return list;
}

}  // namespace

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool is_supported(Isa isa) {
  static const std::vector<bool> table = [] {
    std::vector<bool> t;
    for (int i = 0; i < kIsaCount; ++i) t.push_back(detect(static_cast<Isa>(i)));
    return t;
  }();
  return table[static_cast<int>(isa)];
}

Isa current_isa() {
  const int f = forced.load(std::memory_order_relaxed);
  return f >= 0 ? static_cast<Isa>(f) : best_isa();
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (is_supported(static_cast<Isa>(i))) names.push_back(kNames[i]);
  }
  return names;
}

void force_isa(const std::string& name) {
  if (name.empty()) {
    forced = -1;
    return;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (name == kNames[i] && is_supported(static_cast<Isa>(i))) {
      forced = i;
      return;
    }
  }
  std::string list;
  for (const std::string& s : supported_isas()) list += (list.empty() ? "" : ", ") + s;
  throw std::invalid_argument("instruction set '" + name + "' is not supported here: " + list);
}

CpuKernelBase::CpuKernelBase(const char* name) : name_(name) { kernels().push_back(this); }

const std::vector<CpuKernelBase*>& CpuKernelBase::all() { return kernels(); }

}  // namespace ivr
