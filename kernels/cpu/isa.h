// The instruction sets that CPU kernels are compiled for.
//
// Every kernels/cpu/<op>.cpp is compiled once per instruction set with IVR_ISA set to its name, and
// defines its entry points in namespace ivr::IVR_ISA. Everything else in such a file has internal
// linkage and no std templates are used: a weak symbol compiled for AVX-512 could be kept for the
// whole program.
#pragma once

#include "kernels/dtype.h"

namespace ivr {

enum class Isa : int {
  portable = 0,
  neon = 1,
  avx2 = 2,
  avx512 = 3,
  avx512_bf16 = 4,
  amx_emulated = 5,
  amx = 6
};
constexpr int kIsaCount = 7;

}  // namespace ivr

// Declares an entry point in every instruction set's namespace.
#define IVR_CPU_KERNEL(name, ...) \
  namespace portable {            \
  void name(__VA_ARGS__);         \
  }                               \
  namespace neon {                \
  void name(__VA_ARGS__);         \
  }                               \
  namespace avx2 {                \
  void name(__VA_ARGS__);         \
  }                               \
  namespace avx512 {              \
  void name(__VA_ARGS__);         \
  }

// The same for kernels that exist on dot products of bf16 pairs only (<op>_dot.cpp).
#define IVR_DOT_KERNEL(name, ...) \
  namespace avx512_bf16 {         \
  void name(__VA_ARGS__);         \
  }

// The same for kernels that exist on matrix tiles only (<op>_amx.cpp).
#define IVR_AMX_KERNEL(name, ...) \
  namespace amx_emulated {        \
  void name(__VA_ARGS__);         \
  }                               \
  namespace amx {                 \
  void name(__VA_ARGS__);         \
  }
