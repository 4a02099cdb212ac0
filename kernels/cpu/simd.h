// One small vector type per instruction set, so that a kernel is written once and compiled for
// each.
//
// F holds kLanes floats: 4 (NEON; portable, compiler vectors), 8 (AVX2) or 16 (AVX-512), I as many
// integers; kRegisters are there for them. Everything is in an anonymous namespace: see isa.h.
// Loads and stores take float or bf16 memory, unaligned; the _n forms touch only the first n
// elements (0 <= n <= kLanes) and read zeros beyond. load_even and load_odd take those at even or
// odd places of 2 * kLanes bf16.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
// gcc 12's own headers pass an undefined register to masked builtins and are warned about it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(IVR_NEON)
#include <arm_neon.h>
#endif

namespace ivr {
namespace {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { *p = to_bf16(x); }

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
struct F {
  __m512 v;
};
inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline F load_even(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline F load_odd(const bf16* p) {
  const __m512i high = _mm512_set1_epi32(~0xffff);
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high))};
}
inline F load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline F load_n(const bf16* p, int64_t n) {
  const __m256i h = _mm256_maskz_loadu_epi16(lanes(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline __m256i round_bf16(F a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
}
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(a));
}
inline void store_n(float* p, F a, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
inline void store_n(bf16* p, F a, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes(n), round_bf16(a));
}
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// *a times b plus c as one instruction with its load: see linear.cpp.
inline F fma_from(const float* a, F b, F c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c.v) : "v"(b.v), "m"(*a));
  return c;
}
// min and max return b where either is NaN, as the x86 instructions do.
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
// a < b ? x : y, lane by lane; y where a or b is NaN.
inline F select_lt(F a, F b, F x, F y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// Lane i: x if bit i is set, else y.
inline F select_bits(uint32_t bits, F x, F y) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), y.v, x.v)};
}
inline F round_even(F a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for integral n in [-126, 127].
inline F exp2_int(F n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
// 32 finite numbers rounded to bf16, one after the other; denormals may become zero.
inline void store_rounded(void* p, F first, F second) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
#else
  store(static_cast<bf16*>(p), first);
  store(static_cast<bf16*>(p) + kLanes, second);
#endif
}
#if defined(__AVX512BF16__)
// 16 pairs of bf16.
struct Pairs {
  __m512i v;
};
inline Pairs set_pairs(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int>(pair))}; }
inline Pairs as_pairs(F bits) { return {_mm512_castps_si512(bits.v)}; }
inline Pairs load_pairs(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
// Adds the odd, then the even product of each pair to its lane, rounding after each; denormals
// count as zero.
inline F dot_pairs(Pairs a, Pairs b, F c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F a) { return _mm512_reduce_max_ps(a.v); }
// Four vectors of four lanes at a time: swaps rows and columns of every square of 4 x 4.
inline void transpose_blocks(F* x) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0].v, x[1].v));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2].v, x[3].v));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2].v, x[3].v));
  x[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  x[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  x[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  x[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}
// Swaps rows and columns of a square of kLanes x kLanes.
inline void transpose(F (&x)[kLanes]) {
  // u[4i + c], lanes from 4g on: column 4g + c of rows 4i .. 4i + 3
  F u[16];
  for (int i = 0; i < 16; ++i) u[i] = x[i];
  for (int i = 0; i < 16; i += 4) transpose_blocks(u + i);
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(u[c].v, u[4 + c].v, 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(u[c].v, u[4 + c].v, 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(u[8 + c].v, u[12 + c].v, 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(u[8 + c].v, u[12 + c].v, 0xdd);
    x[c].v = _mm512_shuffle_f32x4(even, even2, 0x88);
    x[4 + c].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
    x[12 + c].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
struct F {
  __m256 v;
};
inline F set(float x) { return {_mm256_set1_ps(x)}; }
inline __m256i lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline F load_even(const bf16* p) {
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))};
}
inline F load_odd(const bf16* p) {
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(~0xffff)))};
}
// Whole vectors, which are nearly all, have a way of their own: masked stores are slow on some
// CPUs, and bf16 has none.
inline F load_n(const float* p, int64_t n) {
  if (n == kLanes) return load(p);
  return {_mm256_maskload_ps(p, lanes(n))};
}
inline F load_n(const bf16* p, int64_t n) {
  if (n == kLanes) return load(p);
  bf16 t[8] = {};
  memcpy(t, p, static_cast<size_t>(n) * 2);
  return load(t);
}
inline __m128i round_bf16(F a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i high = _mm256_srli_epi32(u, 16);
  const __m256i lsb = _mm256_and_si256(high, _mm256_set1_epi32(1));
  __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  return _mm256_castsi256_si128(packed);
}
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16(a)); }
inline void store_n(float* p, F a, int64_t n) {
  if (n == kLanes) return store(p, a);
  _mm256_maskstore_ps(p, lanes(n), a.v);
}
inline void store_n(bf16* p, F a, int64_t n) {
  if (n == kLanes) return store(p, a);
  bf16 t[8];
  store(t, a);
  memcpy(p, t, static_cast<size_t>(n) * 2);
}
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F select_lt(F a, F b, F x, F y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline F select_bits(uint32_t bits, F x, F y) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i mine = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return {_mm256_blendv_ps(y.v, x.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(mine, lane)))};
}
inline F round_even(F a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F exp2_int(F n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
}
inline float sum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(F a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
// Swaps rows and columns of a square of kLanes x kLanes.
inline void transpose(F (&x)[kLanes]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v);
  }
  // u[4i + c], half g of the lanes: column 4g + c of rows 4i .. 4i + 3
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(t[i]), b = _mm256_castps_pd(t[i + 1]);
    const __m256d c = _mm256_castps_pd(t[i + 2]), d = _mm256_castps_pd(t[i + 3]);
    u[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    u[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    u[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    u[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  for (int c = 0; c < 4; ++c) {
    x[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    x[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}

#else

constexpr int kLanes = 4;
#if defined(IVR_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
typedef float FloatVector __attribute__((vector_size(16)));
typedef int32_t IntVector __attribute__((vector_size(16)));
typedef uint32_t BitVector __attribute__((vector_size(16)));
typedef uint16_t HalfVector __attribute__((vector_size(8)));
struct F {
  FloatVector v;
};
inline F set(float x) { return {FloatVector{x, x, x, x}}; }
inline F load(const float* p) {
  F a;
  memcpy(&a.v, p, 16);
  return a;
}
inline F load(const bf16* p) {
  HalfVector h;
  memcpy(&h, p, 8);
  return {(FloatVector)(__builtin_convertvector(h, BitVector) << 16)};
}
inline F load_even(const bf16* p) {
  BitVector u;
  memcpy(&u, p, 16);
  return {(FloatVector)(u << 16)};
}
inline F load_odd(const bf16* p) {
  BitVector u;
  memcpy(&u, p, 16);
  return {(FloatVector)(u & 0xffff0000u)};
}
template <class T>
inline F load_n(const T* p, int64_t n) {
  if (n == kLanes) return load(p);
  F a = set(0.0f);
  for (int64_t i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
inline void store(float* p, F a) { memcpy(p, &a.v, 16); }
inline void store(bf16* p, F a) {
  const BitVector u = (BitVector)a.v, high = u >> 16;
  const BitVector rounded = (u + 0x7fff + (high & 1)) >> 16;
  const HalfVector h = __builtin_convertvector(a.v == a.v ? rounded : high | 0x40, HalfVector);
  memcpy(p, &h, 8);
}
template <class T>
inline void store_n(T* p, F a, int64_t n) {
  if (n == kLanes) return store(p, a);
  for (int64_t i = 0; i < n; ++i) put(p + i, a.v[i]);
}
inline F operator+(F a, F b) { return {a.v + b.v}; }
inline F operator-(F a, F b) { return {a.v - b.v}; }
inline F operator*(F a, F b) { return {a.v * b.v}; }
inline F operator/(F a, F b) { return {a.v / b.v}; }
#if defined(IVR_NEON)
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
#else
// No fused instruction on the baseline: two roundings, the same in every path of this build.
inline F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
#endif
inline F select_lt(F a, F b, F x, F y) { return {a.v < b.v ? x.v : y.v}; }
inline F select_bits(uint32_t bits, F x, F y) {
  const IntVector lane = {1, 2, 4, 8};
  return {(lane & static_cast<int32_t>(bits)) != 0 ? x.v : y.v};
}
inline F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
inline F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
inline F round_even(F a) {
  // Adding and subtracting 1.5 * 2^23 rounds |a| < 2^22 to the nearest even integer.
  const FloatVector magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
  return {(a.v + magic) - magic};
}
inline F exp2_int(F n) {
  const IntVector e = (__builtin_convertvector(n.v, IntVector) + 127) << 23;
  F r;
  memcpy(&r.v, &e, 16);
  return r;
}
inline float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(F a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
// Swaps rows and columns of a square of kLanes x kLanes.
inline void transpose(F (&x)[kLanes]) {
  const FloatVector a = __builtin_shufflevector(x[0].v, x[1].v, 0, 4, 1, 5);
  const FloatVector b = __builtin_shufflevector(x[0].v, x[1].v, 2, 6, 3, 7);
  const FloatVector c = __builtin_shufflevector(x[2].v, x[3].v, 0, 4, 1, 5);
  const FloatVector d = __builtin_shufflevector(x[2].v, x[3].v, 2, 6, 3, 7);
  x[0].v = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  x[1].v = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  x[2].v = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  x[3].v = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

#endif

// load_n of a vector from a longer or shorter run of n elements, n < 0 where it has ended.
template <class T>
inline F load_rest(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n < 0 ? 0 : n);
}

// kLanes integers. Not __m512i, which gcc 12 takes for eight numbers: it copies and spills the sums
// of a loop then, at half the rate.
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
inline I load_ints(const void* p) {
  I a;
  memcpy(&a, p, sizeof(a));
  return a;
}
inline I set_ints(int32_t x) { return I{} + x; }
inline I to_ints(F whole) { return __builtin_convertvector(whole.v, I); }
inline F to_floats(I a) { return {__builtin_convertvector(a, decltype(F::v))}; }

// Fused where the instruction set has it: scalar tails round like the vector body.
inline float fma1(float a, float b, float c) {
#if defined(__FMA__) || defined(IVR_NEON)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// c[0] x^n + c[1] x^(n-1) + ... + c[n]
template <int n>
inline F polynomial(F x, const float (&c)[n]) {
  F p = set(c[0]);
  for (int i = 1; i < n; ++i) p = fma(p, x, set(c[i]));
  return p;
}

// The functions below have a short form, of fewer terms, for results that are rounded to bf16.
template <class T>
constexpr bool kShort = sizeof(T) < sizeof(float);

// 2^x for x <= 1, within 2 ulp (short: 3e-6); exactly 0 below -126 (no denormals), NaN stays NaN.
// The workhorse of softmax: x = n + r, |r| <= 1/2, minimax polynomial in r (relative error 2e-9
// before rounding).
template <bool Short = false>
inline F exp2_small(F x) {
#if defined(__AVX512F__)
  const F r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const F n = x - r;
#else
  const F n = round_even(max(x, set(-126.0f)));
  const F r = x - n;
#endif
  F p;
  if constexpr (!Short) {
    p = polynomial(r, {1.535336188e-4f, 1.339887442e-3f, 9.618437358e-3f, 5.550332471e-2f,
                       2.402264791e-1f, 6.931472029e-1f, 1.0f});
  } else {
    p = polynomial(r,
                   {9.5828296617e-3f, 5.5906426162e-2f, 2.4024099112e-1f, 6.9312417507e-1f, 1.0f});
  }
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, p.v, n.v)};
#else
  return select_lt(x, set(-126.0f), set(0.0f), p * exp2_int(n));
#endif
}

constexpr float kLog2e = 1.44269504088896341f;
// e^x for x <= 0; its relative error is that of x, rounded, beside 2^x's own.
inline F exp_small(F x) { return exp2_small(x * set(kLog2e)); }

// x * sigmoid(alpha * x). The power is that of -|alpha x|, which does not overflow.
template <bool Short = false>
inline F silu(F x, float alpha = 1.0f) {
  const F t = x * set(alpha * kLog2e), zero = set(0.0f), one = set(1.0f);
  const F e = exp2_small<Short>(min(t, zero - t));
  return x * select_lt(t, zero, e, one) / (one + e);
}

// GPT-OSS's: gate * sigmoid(1.702 gate) * (up + 1), gate cut off above 7 and up clipped to
// [-7, 7].
template <bool Short = false>
inline F gpt_oss_gate(F gate, F up) {
  const F limit = set(7.0f);
  // min and max pass a NaN in their second argument on.
  const F clipped = max(set(-7.0f), min(limit, up));
  return silu<Short>(min(limit, gate), 1.702f) * (clipped + set(1.0f));
}

// x * Phi(x) = max(x, 0) - u erfc(u / sqrt 2) / 2, u = |x|, within 4e-8 (absolute; short: 6e-7, and
// 4e-6 of min(u / 2, 0.17)) of the exact value. log2 erfc(u / sqrt 2) / u is a smooth function: a
// polynomial fitted on [0, 7] with the error's weight in the result; beyond, it falls on.
template <bool Short = false>
inline F gelu(F x) {
  const F u = max(set(0.0f) - x, x);
  F q;
  if constexpr (!Short) {
    q = polynomial(u, {-1.9020659465e-6f, 2.8056945666e-5f, -1.3147325080e-4f, -2.7207564563e-4f,
                       7.2454209439e-3f, -5.2627611905e-2f, -4.5916214585e-1f, -1.1511110067f});
  } else {
    q = polynomial(u, {-4.9273145851e-4f, 7.2318571620e-3f, -5.2229184657e-2f, -4.5951190591e-1f,
                       -1.1510294676f});
  }
  // Capped, so that inf * 0 does not arise; max and min pass a NaN in their second argument on.
  const F half = set(0.5f) * min(set(64.0f), u);
  return max(set(0.0f), x) - half * exp2_small<Short>(q * u);
}

}  // namespace
}  // namespace ivr
