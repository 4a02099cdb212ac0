// Quantised weights on their way to a product in fp32: the codes of a panel become weights
// q * scale.
//
// q * scale has at most 16 significant bits: it is exact in fp32. Codes are put into the low bits
// of a float's mantissa; one fused multiply-add takes the offset away and scales, without a
// rounding in between that counts.
#pragma once

#include "kernels/cpu/linear_chunks.h"
#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

// A word of codes: consecutive k of one column. Code k of eight begins at bit at(k) of word
// word(k).
struct Int8Codes {
  static constexpr WeightFormat kFormat = WeightFormat::int8;
  static constexpr int kBits = 8, kWords = 2;  // words of eight k
  static constexpr int word(int k) { return k / 4; }
  static constexpr int at(int k) { return k % 4 * 8; }
  uint32_t word_;
};
struct Int4Codes {
  static constexpr WeightFormat kFormat = WeightFormat::int4;
  static constexpr int kBits = 4, kWords = 1;
  static constexpr int word(int) { return 0; }
  static constexpr int at(int k) { return k % 4 * 8 + k / 4 * 4; }
  uint32_t word_;
};

template <class W>
constexpr bool kIsCode = false;
template <>
constexpr bool kIsCode<Int8Codes> = true;
template <>
constexpr bool kIsCode<Int4Codes> = true;

// Codes as floats, with an offset that the fused multiply-add takes away again.
#if defined(__AVX512F__)

struct Words {
  __m512i v;
};
inline Words load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
// A float of exponent e holds an integer below 2^e in its bits from 23 - e on. Codes are moved to
// bit 8 or 12: there offset * scale is exact.
constexpr int shift_of(int at) { return at < 8 ? -8 : (at - 8) / 8 * 8; }
template <int kBits>
constexpr float offset_of(int at) {
  return static_cast<float>((1 << (23 - (at - shift_of(at)))) + (1 << (kBits - 1)));
}
template <int kBits, int kAt>
inline F code_of(Words u) {
  constexpr int kShift = shift_of(kAt), kPlace = kAt - kShift, kAndOr = 0xea;  // (a & b) | c
  if constexpr (kShift < 0) u.v = _mm512_slli_epi32(u.v, -kShift);
  if constexpr (kShift > 0) u.v = _mm512_srli_epi32(u.v, kShift);
  return {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(u.v, _mm512_set1_epi32(((1 << kBits) - 1) << kPlace),
                                _mm512_set1_epi32((127 + 23 - kPlace) << 23), kAndOr))};
}

#else

#if defined(__AVX2__)
struct Words {
  __m256i v;
};
inline Words load_words(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
template <int kBits, int kAt>
inline F code_of(Words u) {
  const __m256i mask = _mm256_set1_epi32((1 << kBits) - 1);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(u.v, kAt), mask))};
}
#else
struct Words {
  uint32_t v[kLanes];
};
inline Words load_words(const void* p) {
  Words u;
  memcpy(u.v, p, sizeof(u.v));
  return u;
}
template <int kBits, int kAt>
inline F code_of(Words u) {
  F a;
  for (int i = 0; i < kLanes; ++i) {
    a.v[i] = static_cast<float>(u.v[i] >> kAt & ((1u << kBits) - 1));
  }
  return a;
}
#endif
template <int kBits>
constexpr float offset_of(int) {
  return 1 << (kBits - 1);
}

#endif

// Weight k of eight, for kLanes columns.
template <class Code, int k>
inline F weight_of(const Words* u, F scale) {
  constexpr float kOffset = offset_of<Code::kBits>(Code::at(k));
  return fma(code_of<Code::kBits, Code::at(k)>(u[Code::word(k)]), scale, scale * set(-kOffset));
}

constexpr int64_t kOctet = 8;          // k that are decoded together
constexpr int64_t kCodesAhead = 2048;  // bytes that are fetched in advance

template <class Code>
const bf16* scales_of(const Code* group) {
  return reinterpret_cast<const bf16*>(group);
}
template <class Code>
const Code* codes_of(const Code* group) {
  return beside(group, kScaleBytes);
}

// Weights [k, 8) of eight, for kLanes columns.
template <class Code, int k = 0>
inline void put_octet(const Words* u, F scale, float* to) {
  store(to + k * kPanelColumns, weight_of<Code, k>(u, scale));
  if constexpr (k + 1 < kOctet) put_octet<Code, k + 1>(u, scale, to);
}

// k from `begin` to `end` of one group of a panel; both are multiples of kOctet.
template <class Code>
void decode_group(const Code* group, int64_t begin, int64_t end, float* to) {
  if (begin == 0) __builtin_prefetch(beside(group, kCodesAhead));
  for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
    const F scale = load(scales_of(group) + j);
    for (int64_t k = begin; k < end; k += kOctet) {
      const Code* at = codes_of(group) + k / kOctet * Code::kWords * kPanelColumns + j;
      Words u[Code::kWords];
      for (int i = 0; i < Code::kWords; ++i) {
        if (j % 16 == 0) __builtin_prefetch(beside(at + i * kPanelColumns, kCodesAhead));
        u[i] = load_words(at + i * kPanelColumns);
      }
      put_octet<Code>(u, scale, to + (k - begin) * kPanelColumns + j);
    }
  }
}

// n weights, rounded up to kOctet, of every column of the panel whose groups begin at w, from k on:
// [n][32].
template <class Code>
void decode(const Code* w, int64_t k, int64_t n, float* to) {
  const int64_t stop = k + ceil_div(n, kOctet) * kOctet;
  while (k < stop) {
    const int64_t begin = k % kQuantGroup, end = least(begin + stop - k, kQuantGroup);
    decode_group(beside(w, panel_bytes(Code::kFormat, k - begin)), begin, end, to);
    to += (end - begin) * kPanelColumns;
    k += end - begin;
  }
}

}  // namespace
}  // namespace ivr
