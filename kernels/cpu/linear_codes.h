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

// Two k of a column: q + 128 each.
struct Int8Pair {
  static constexpr WeightFormat kFormat = WeightFormat::int8;
  uint8_t even, odd;
};
// Two k of a column: q + 8 each, the even one in the low half.
struct Int4Pair {
  static constexpr WeightFormat kFormat = WeightFormat::int4;
  uint8_t both;
};

template <class W>
constexpr bool kIsCode = false;
template <>
constexpr bool kIsCode<Int8Pair> = true;
template <>
constexpr bool kIsCode<Int4Pair> = true;

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

// What load_codes adds to the q of an even and of an odd k.
struct Bias {
  float even, odd;
};

#if defined(__AVX512F__)

constexpr int kAndOr = 0xea;  // (a & b) | c
// A float of exponent e holds an integer below 2^8 in its bits from 23 - e on.
inline F with_exponent(__m512i bits, int mask, int exponent) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      bits, _mm512_set1_epi32(mask), _mm512_set1_epi32((127 + exponent) << 23), kAndOr))};
}
inline void load_codes(const Int8Pair* p, F& even, F& odd) {
  const __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  even = with_exponent(_mm512_slli_epi32(u, 8), 0xff00, 15);
  odd = with_exponent(u, 0xff00, 15);
}
inline void load_codes(const Int4Pair* p, F& even, F& odd) {
  // Byte i goes to bits 8 to 15 of lane i.
  const __m512i places =
      _mm512_set_epi32(0x0f00, 0x0e00, 0x0d00, 0x0c00, 0x0b00, 0x0a00, 0x0900, 0x0800, 0x0700,
                       0x0600, 0x0500, 0x0400, 0x0300, 0x0200, 0x0100, 0x0000);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m512i u = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), places);
  even = with_exponent(u, 0x0f00, 15);
  odd = with_exponent(u, 0xf000, 11);
}
constexpr Bias bias_of(const Int8Pair*) { return {32768 + 128, 32768 + 128}; }
constexpr Bias bias_of(const Int4Pair*) { return {32768 + 8, 2048 + 8}; }

#elif defined(__AVX2__)

inline F from_ints(__m256i u) { return {_mm256_cvtepi32_ps(u)}; }
inline void load_codes(const Int8Pair* p, F& even, F& odd) {
  const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  even = from_ints(_mm256_and_si256(u, _mm256_set1_epi32(255)));
  odd = from_ints(_mm256_srli_epi32(u, 8));
}
inline void load_codes(const Int4Pair* p, F& even, F& odd) {
  const __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  even = from_ints(_mm256_and_si256(u, _mm256_set1_epi32(15)));
  odd = from_ints(_mm256_srli_epi32(u, 4));
}

#else

inline void load_codes(const Int8Pair* p, F& even, F& odd) {
  for (int i = 0; i < kLanes; ++i) {
    even.v[i] = p[i].even;
    odd.v[i] = p[i].odd;
  }
}
inline void load_codes(const Int4Pair* p, F& even, F& odd) {
  for (int i = 0; i < kLanes; ++i) {
    even.v[i] = static_cast<float>(p[i].both & 15);
    odd.v[i] = static_cast<float>(p[i].both >> 4);
  }
}

#endif
#if !defined(__AVX512F__)
constexpr Bias bias_of(const Int8Pair*) { return {128, 128}; }
constexpr Bias bias_of(const Int4Pair*) { return {8, 8}; }
#endif

constexpr int64_t pair_stride(const float*) { return 2 * kPanelColumns; }
constexpr int64_t pair_stride(const uint32_t*) { return kPanelColumns; }

constexpr int64_t kGroupPairs = kQuantGroup / 2;
constexpr int64_t kCodesAhead = 2048;  // bytes that are fetched in advance

template <class Code>
const bf16* scales_of(const Code* group) {
  return reinterpret_cast<const bf16*>(group);
}
template <class Code>
const Code* codes_of(const Code* group) {
  return beside(group, kScaleBytes);
}

// Pairs [begin, end) of one group of a panel in fp32.
template <class Code>
void decode_group(const Code* group, int64_t begin, int64_t end, float* to) {
  constexpr Bias kBias = bias_of(static_cast<const Code*>(nullptr));
  for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
    const F scale = load(scales_of(group) + j);
    const F even_offset = scale * set(-kBias.even), odd_offset = scale * set(-kBias.odd);
    for (int64_t k = begin; k < end; ++k) {
      const Code* at = codes_of(group) + k * kPanelColumns + j;
      if (j == 0) __builtin_prefetch(beside(at, kCodesAhead));
      F even, odd;
      load_codes(at, even, odd);
      float* row = to + (k - begin) * 2 * kPanelColumns + j;
      store(row, fma(even, scale, even_offset));
      store(row + kPanelColumns, fma(odd, scale, odd_offset));
    }
  }
}

#if defined(__AVX512F__)

// What 16 columns' codes are multiplied by and what is added: lanes 2c and 2c + 1 are the even and
// the odd k of column c of eight, which is the order of pairs of bf16.
struct PairScales {
  F scale[2], offset[2];
};

template <class Code>
PairScales load_pair_scales(const bf16* p) {
  constexpr Bias kBias = bias_of(static_cast<const Code*>(nullptr));
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512 less = _mm512_mask_blend_ps(0xaaaa, set(-kBias.even).v, set(-kBias.odd).v);
  const F s = load(p);
  PairScales scales;
  for (int i = 0; i < 2; ++i) {
    const __m512i columns = _mm512_add_epi32(twice, _mm512_set1_epi32(8 * i));
    scales.scale[i].v = _mm512_permutexvar_ps(columns, s.v);
    scales.offset[i] = scales.scale[i] * F{less};
  }
  return scales;
}

// Byte index[i] of the 16 at p goes to bits 8 to 15 of lane i; the other bits are arbitrary.
inline __m512i spread(const void* p, __m512i index) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), _mm512_slli_epi32(index, 8));
}

// 16 columns of a pair as pairs of bf16.
inline __m512i load_decoded(const Int8Pair* p, const PairScales& by) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const F low = with_exponent(spread(p, lane), 0xff00, 15);
  const F high = with_exponent(spread(p + 8, lane), 0xff00, 15);
  return round_pairs(fma(low, by.scale[0], by.offset[0]), fma(high, by.scale[1], by.offset[1]));
}
inline __m512i load_decoded(const Int4Pair* p, const PairScales& by) {
  const __m512i low_half = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i high_half = _mm512_add_epi32(low_half, _mm512_set1_epi32(8));
  const __m512i mask = _mm512_set1_epi64(0x0000f00000000f00);
  const __m512i exponents = _mm512_set1_epi64(0x4500000047000000);  // 2^11 of odd k, 2^15 of even
  const F low = {
      _mm512_castsi512_ps(_mm512_ternarylogic_epi32(spread(p, low_half), mask, exponents, kAndOr))};
  const F high = {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(spread(p, high_half), mask, exponents, kAndOr))};
  return round_pairs(fma(low, by.scale[0], by.offset[0]), fma(high, by.scale[1], by.offset[1]));
}

// Pairs [begin, end) of one group of a panel in bf16.
template <class Code>
void decode_group(const Code* group, int64_t begin, int64_t end, uint32_t* to) {
  for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
    const PairScales by = load_pair_scales<Code>(scales_of(group) + j);
    for (int64_t k = begin; k < end; ++k) {
      const Code* at = codes_of(group) + k * kPanelColumns + j;
      if (j == 0) __builtin_prefetch(beside(at, kCodesAhead));
      _mm512_storeu_si512(to + (k - begin) * kPanelColumns + j, load_decoded(at, by));
    }
  }
}

#endif

// `pairs` pairs from pair k on of the panel whose groups begin at w, as the product reads them:
// fp32 [2 * pairs][32], or bf16 [pairs][32][2]. Every path of a product gets its weights here.
template <class Code, class To>
void decode(const Code* w, int64_t k, int64_t pairs, To* to) {
  const int64_t stop = k + pairs;
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
