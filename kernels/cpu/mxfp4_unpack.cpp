// mxfp4_unpack on the CPU: a block's 16 possible values are made once, then looked up.
#include "kernels/mxfp4_unpack.h"

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

constexpr float kValues[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

// 2^(scale - 127) as two factors of the normal range: exact also where the product is not normal.
inline void table_of(uint8_t scale, bf16* table) {
  const int low = (scale - 127) / 2, high = scale - 127 - low;
  const uint32_t bits[2] = {static_cast<uint32_t>(low + 127) << 23,
                            static_cast<uint32_t>(high + 127) << 23};
  float factors[2];
  memcpy(factors, bits, 8);
  for (int i = 0; i < 8; ++i) {
    const float v = scale == 255 ? __builtin_nanf("") : kValues[i] * factors[0] * factors[1];
    table[i] = to_bf16(v);
    table[i + 8] = to_bf16(-v);
  }
}

}  // namespace

namespace IVR_ISA {

void mxfp4_unpack(const Mxfp4Params& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    bf16 table[16];
    table_of(p.scales[b], table);
    const uint8_t* block = p.blocks + b * kMxfp4Block / 2;
    bf16* out = static_cast<bf16*>(p.out) + b * kMxfp4Block;
    for (int64_t i = 0; i < kMxfp4Block / 2; ++i) {
      out[2 * i] = table[block[i] & 15];
      out[2 * i + 1] = table[block[i] >> 4];
    }
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
