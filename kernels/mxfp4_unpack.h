// mxfp4_unpack: blocks of 32 four-bit floats with one shared exponent to bf16 (OCP Microscaling
// Formats, MXFP4). Byte i of a block holds element 2i in its low and 2i + 1 in its high half:
// sign, two bits of exponent, one of mantissa. value = element * 2^(scale - 127), which bf16 holds
// exactly unless it is beyond its range (inf); scale 255 is NaN.
#pragma once

#include "kernels/cpu/isa.h"

namespace ivr {

constexpr int64_t kMxfp4Block = 32;

struct Mxfp4Params {
  const uint8_t* blocks;  // [B][16]
  const uint8_t* scales;  // [B]
  void* out;              // bf16 [B][32]
  int64_t B;
};

// Blocks [begin, end).
IVR_CPU_KERNEL(mxfp4_unpack, const Mxfp4Params& p, int64_t begin, int64_t end)

}  // namespace ivr
