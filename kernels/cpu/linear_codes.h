// Quantised weights on their way to a product: the codes of a panel become weights q * scale, in
// the layout that the product's loop reads.
//
// q * scale has at most 16 significant bits: it is exact in fp32, and rounded to nearest even where
// a product's operands are bf16. Codes are put into the low bits of a float's mantissa; one fused
// multiply-add takes the offset away and scales, without a rounding in between that counts.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/linear.h"

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

template <class T>
const T* beside(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

// A panel from k on, which begins a group.
template <class W>
const W* panel_at(const LinearParams& p, int64_t panel, int64_t k) {
  return beside(static_cast<const W*>(p.weight),
                panel * panel_bytes(p.format, p.K) + panel_bytes(p.format, k));
}

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

// The pair of k and k + 1 of a panel's columns from j on: rows of fp32, or bf16 next to each other.
template <class Code, int k>
inline void put_pair(const Words* u, F scale, float* to) {
  store(to + k * kPanelColumns, weight_of<Code, k>(u, scale));
  store(to + (k + 1) * kPanelColumns, weight_of<Code, k + 1>(u, scale));
}
#if defined(__AVX512F__)
template <class Code, int k>
inline void put_pair(const Words* u, F scale, uint32_t* to) {
  const F even = weight_of<Code, k>(u, scale), odd = weight_of<Code, k + 1>(u, scale);
  _mm512_storeu_si512(to + k / 2 * kPanelColumns, round_pairs(even, odd));
}
#endif

constexpr int64_t pair_stride(const float*) { return 2 * kPanelColumns; }
constexpr int64_t pair_stride(const uint32_t*) { return kPanelColumns; }

constexpr int64_t kGroupPairs = kQuantGroup / 2;
constexpr int64_t kOctet = 4;          // pairs that are decoded together
constexpr int64_t kCodesAhead = 2048;  // bytes that are fetched in advance

template <class Code>
const bf16* scales_of(const Code* group) {
  return reinterpret_cast<const bf16*>(group);
}
template <class Code>
const Code* codes_of(const Code* group) {
  return beside(group, kScaleBytes);
}

// Pairs [begin, end) of one group of a panel; both are multiples of kOctet.
template <class Code, class To>
void decode_group(const Code* group, int64_t begin, int64_t end, To* to) {
  for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
    const F scale = load(scales_of(group) + j);
    for (int64_t k = begin; k < end; k += kOctet) {
      const Code* at = codes_of(group) + k / kOctet * Code::kWords * kPanelColumns + j;
      Words u[Code::kWords];
      for (int i = 0; i < Code::kWords; ++i) {
        if (j % 16 == 0) __builtin_prefetch(beside(at + i * kPanelColumns, kCodesAhead));
        u[i] = load_words(at + i * kPanelColumns);
      }
      To* row = to + (k - begin) * pair_stride(to) + j;
      put_pair<Code, 0>(u, scale, row);
      put_pair<Code, 2>(u, scale, row);
      put_pair<Code, 4>(u, scale, row);
      put_pair<Code, 6>(u, scale, row);
    }
  }
}

// `pairs` pairs, rounded up to kOctet, from pair k on of the panel whose groups begin at w, as the
// product reads them: fp32 [2 * pairs][32], or bf16 [pairs][32][2].
template <class Code, class To>
void decode(const Code* w, int64_t k, int64_t pairs, To* to) {
  const int64_t stop = k + (pairs + kOctet - 1) / kOctet * kOctet;
  while (k < stop) {
    const int64_t begin = k % kGroupPairs;
    const int64_t end = stop - k < kGroupPairs - begin ? begin + stop - k : kGroupPairs;
    decode_group(beside(w, panel_bytes(Code::kFormat, (k - begin) * 2)), begin, end, to);
    to += (end - begin) * pair_stride(to);
    k += end - begin;
  }
}

}  // namespace
}  // namespace ivr
