// mxfp4_unpack on the CPU: a block's 16 possible values are made once, then looked up. Bytes moved:
// 17 + 64 per block.
#include "kernels/mxfp4_unpack.h"

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

constexpr float kValues[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

// The values at scale 127, as bf16.
alignas(16) constexpr uint16_t kBits[16] = {
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
    0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
};

// Normal numbers: the scale goes into the exponent. All of a block's are normal from 2 to 252.
inline bool in_exponent(uint8_t scale) { return scale >= 2 && scale <= 252; }

inline void table_of(uint8_t scale, uint16_t* table) {
  if (in_exponent(scale)) {
    for (int i = 0; i < 16; ++i) {
      table[i] = static_cast<uint16_t>(kBits[i] + (i % 8 ? (scale - 127) * 128 : 0));
    }
    return;
  }
  // 2^(scale - 127) as two factors of the normal range.
  const int low = (scale - 127) / 2, high = scale - 127 - low;
  const uint32_t bits[2] = {static_cast<uint32_t>(low + 127) << 23,
                            static_cast<uint32_t>(high + 127) << 23};
  float factors[2];
  memcpy(factors, bits, 8);
  for (int i = 0; i < 8; ++i) {
    const float v = scale == 255 ? __builtin_nanf("") : kValues[i] * factors[0] * factors[1];
    table[i] = to_bf16(v).bits;
    table[i + 8] = to_bf16(-v).bits;
  }
}

#if defined(__AVX2__)

// 16 elements: low and high bytes are looked up apart.
inline void look_up(__m128i index, __m128i low, __m128i high, uint16_t* out) {
  const __m128i l = _mm_shuffle_epi8(low, index), h = _mm_shuffle_epi8(high, index);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(l, h));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi8(l, h));
}

inline void unpack_block(const uint8_t* block, const uint16_t* table, uint16_t* out) {
  const __m128i half = _mm_set1_epi8(15), byte = _mm_set1_epi16(255);
  const __m128i t0 = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i t1 = _mm_load_si128(reinterpret_cast<const __m128i*>(table + 8));
  const __m128i low = _mm_packus_epi16(_mm_and_si128(t0, byte), _mm_and_si128(t1, byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(t0, 8), _mm_srli_epi16(t1, 8));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block));
  const __m128i even = _mm_and_si128(b, half), odd = _mm_and_si128(_mm_srli_epi16(b, 4), half);
  look_up(_mm_unpacklo_epi8(even, odd), low, high, out);
  look_up(_mm_unpackhi_epi8(even, odd), low, high, out + 16);
}

#else

inline void unpack_block(const uint8_t* block, const uint16_t* table, uint16_t* out) {
  for (int64_t i = 0; i < kMxfp4Block / 2; ++i) {
    out[2 * i] = table[block[i] & 15];
    out[2 * i + 1] = table[block[i] >> 4];
  }
}

#endif

}  // namespace

namespace IVR_ISA {

void mxfp4_unpack(const Mxfp4Params& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    alignas(16) uint16_t table[16];
    table_of(p.scales[b], table);
    unpack_block(p.blocks + b * kMxfp4Block / 2, table,
                 static_cast<uint16_t*>(p.out) + b * kMxfp4Block);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
