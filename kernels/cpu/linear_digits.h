// Products of bf16 rows with the codes of an int8 or int4 weight, and those of a few rows, on
// integer multiply-adds.
//
// A group of 64 values of x becomes integers times a power of two: below 2^14, so that a value is
// exact unless it is 64 times smaller than the largest of its group, and then off by at most 2^-14
// of that one's power of two. Four codes of a column meet four of them, 32 bits wide and exact: as
// two digits of 8 bits in two instructions where there is VNNI, else in pairs of 16 bits. The sum
// of a group, less what the codes' offset brought in, becomes fp32 and is added times both scales:
// one chain of fused multiply-adds over the groups per element, for every number of rows and every
// instruction set (the portable one rounds twice). Codes are never turned into numbers. NaN and
// infinities make a group's scale NaN.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/cpu/linear_chunks.h"
#include "kernels/cpu/linear_codes.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/simd.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

constexpr int64_t kPanelVectors = kPanelColumns / kLanes;
constexpr int64_t kQuads = kQuantGroup / 4;
constexpr int64_t kPieceGroups = 8;  // a piece of a panel is 16 KB of int8
// Bytes of a stream that are fetched in advance: of one into L2, near where one or two rows meet it
// (which leaves the most to Zen 4's own prefetchers), of several into L1.
template <int Rows>
constexpr int64_t kAhead = Rows <= 2 ? 1024 : 8192;
constexpr int64_t kAheadOfMany = 512;

// Rows of a block. As many sums as the registers hold: up to half of those rows meet two vectors of
// columns at a time on AVX-512, one row meets whole panels.
constexpr int64_t kRows = kLanes == 16 ? 12 : 6;
template <int Rows>
constexpr int kPass = kLanes == 16 && Rows <= kRows / 2 ? 2 : 1;

inline int32_t int_at(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

#if defined(__SSE2__)
inline __m128i load_four(const int32_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
// Digits of 8 bits, 256 * high + low: [high, low][4].
inline void put_digits(const int32_t* x, char* to) {
  const __m128i all = load_four(x);
  const __m128i high = _mm_srai_epi32(_mm_add_epi32(all, _mm_set1_epi32(128)), 8);
  const __m128i low = _mm_sub_epi32(all, _mm_slli_epi32(high, 8));
  const __m128i words = _mm_packs_epi32(high, low);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}
#endif

// How four codes of every column meet four integers of x: Quad are the codes, from the low or the
// high halves of bytes where they have 4 bits; put_quad writes the integers, in 8 bytes; add adds
// the products to sums, which `start` with a number and become one in `total`.
#if defined(__AVX512VNNI__)

struct Sum {
  I high, low;
};
inline Sum start(int32_t x) { return {I{}, set_ints(x)}; }
inline I total(Sum sum) { return (sum.high << 8) + sum.low; }

struct Quad {
  I bytes;
};
template <int kBits>
inline Quad quad_of(I u, int half) {
  return {kBits == 8 ? u : (u >> 4 * half) & 0x0f0f0f0f};
}
inline void put_quad(const int32_t* x, char* to) { put_digits(x, to); }
inline I dot_bytes(I sum, I codes, const char* digits) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(int_at(digits)));
}
inline void add(Quad q, const char* x, Sum& sum) {
  sum.high = dot_bytes(sum.high, q.bytes, x);
  sum.low = dot_bytes(sum.low, q.bytes, x + 4);
}

#else

struct Quad {
  I even, odd;  // pairs of 16 bits
};
template <int kBits>
inline Quad quad_of(I u, int half) {
  constexpr int32_t kMask = ((1 << kBits) - 1) * 0x10001;
  return {(u >> 4 * half) & kMask, (u >> (4 * half + 8)) & kMask};
}
inline void put_quad(const int32_t* x, char* to) {
#if defined(__SSE2__)
  const __m128i words = _mm_packs_epi32(load_four(x), _mm_setzero_si128());
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to),
                   _mm_shufflelo_epi16(words, _MM_SHUFFLE(3, 1, 2, 0)));
#else
  const int16_t words[4] = {static_cast<int16_t>(x[0]), static_cast<int16_t>(x[2]),
                            static_cast<int16_t>(x[1]), static_cast<int16_t>(x[3])};
  memcpy(to, words, sizeof(words));
#endif
}

#if defined(IVR_NEON)

// Two sums of each column: of the first two columns, and of the others.
struct Sum {
  I low, high;
};
inline Sum start(int32_t x) {
  const I pairs = {x, 0, x, 0};
  return {pairs, pairs};
}
inline I total(Sum sum) { return vpaddq_s32(sum.low, sum.high); }
inline void add_words(I codes, const char* x, Sum& sum) {
  const int16x8_t a = (int16x8_t)codes, b = (int16x8_t)vdupq_n_s32(int_at(x));
  sum.low = vmlal_s16(sum.low, vget_low_s16(a), vget_low_s16(b));
  sum.high = vmlal_high_s16(sum.high, a, b);
}

#else

struct Sum {
  I all;
};
inline Sum start(int32_t x) { return {set_ints(x)}; }
inline I total(Sum sum) { return sum.all; }
inline void add_words(I codes, const char* x, Sum& sum) {
#if defined(__AVX512F__)
  sum.all += (I)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(int_at(x)));
#elif defined(__AVX2__)
  sum.all += (I)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(int_at(x)));
#elif defined(__SSE2__)
  sum.all += (I)_mm_madd_epi16((__m128i)codes, _mm_set1_epi32(int_at(x)));
#else
  int16_t words[2];
  memcpy(words, x, sizeof(words));
  sum.all += (codes & 0xffff) * words[0] + (codes >> 16) * words[1];
#endif
}

#endif

inline void add(Quad q, const char* x, Sum& sum) {
  add_words(q.even, x, sum);
  add_words(q.odd, x + 4, sum);
}

#endif

inline int64_t groups_of(const LinearParams& p) { return ceil_div(p.K, kQuantGroup); }

// Rows of a block, the last one's aside.
inline int64_t block_rows(const LinearParams& p) { return even_rows(p.M, kRows); }

// What a group of a row is beside its integers. less: what the codes' offset adds to a sum.
struct Terms {
  int32_t less;
  float scale;
};
inline Terms terms_at(const char* p) {
  Terms terms;
  memcpy(&terms, p, sizeof(terms));
  return terms;
}

// A group of x for a block of rows: quads [quad][row], then the terms of every row.
constexpr int64_t kQuadBytes = 8;
constexpr int64_t kTermBytes = sizeof(Terms);
constexpr int64_t kRowQuads = kQuads * kQuadBytes;
constexpr int64_t kRowBytes = kRowQuads + kTermBytes;

inline char* group_at(const LinearParams& p, int64_t m, int64_t rows, int64_t g) {
  return static_cast<char*>(p.workspace) + (m * groups_of(p) + g * rows) * kRowBytes;
}

// Where a panel's codes lie, group after group.
struct Source {
  const char* codes;
  const char* scales;
  int64_t codes_group, scales_group;  // bytes from one group to the next
  int64_t panel;                      // bytes from one panel to the next

  const char* codes_of(int vector) const { return codes + at(vector, 4); }
  const char* scales_of(int vector) const { return scales + at(vector, 2); }
  int64_t at(int vector, int64_t size) const {
    return vector / kPanelVectors * panel + vector % kPanelVectors * kLanes * size;
  }
};

template <int Rows, int Vectors>
inline void fetch_ahead(const char* at) {
  if constexpr (Vectors <= kPanelVectors) {
    __builtin_prefetch(at + kAhead<Rows>, 0, 2);
  } else {
    __builtin_prefetch(at + kAheadOfMany);
  }
}

// *to (+)= the sum of a group, times both scales.
inline void add_group(I sum, F scale, bool resume, float* to) {
  store(to, fma(to_floats(sum), scale, resume ? load(to) : set(0.0f)));
}

// c[Rows][32] (+)= the product of a group, for Vectors vectors of columns from `first` on.
template <int kBits, int Rows, int Vectors>
[[gnu::always_inline]] inline void multiply_group(const char* x, Source w, int first, float* c,
                                                  bool resume) {
  constexpr int kHalves = 8 / kBits;
  const char* terms = x + Rows * kRowQuads;
  Sum sums[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[r][v] = start(terms_at(terms + r * kTermBytes).less);
  }
  for (int64_t line = 0; line < kQuads / kHalves; ++line) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half, x += Rows * kQuadBytes) {
      Quad q[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const char* at = w.codes_of(first + v) + line * kPanelColumns * 4;
        if (half == 0) fetch_ahead<Rows, Vectors>(at);
        q[v] = quad_of<kBits>(load_ints(at), half);
      }
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) add(q[v], x + kQuadBytes * r, sums[r][v]);
      }
#if defined(__SSE2__) && !defined(__AVX512F__)
      // The halves one after the other: gcc mixes them, and has no registers left for sums then.
      if constexpr (kHalves > 1 && Rows > 1) {
        for (int r = 0; r < Rows; ++r) asm("" : "+x"(sums[r][0].all), "+r"(x));
      }
#endif
    }
  }
  // Without their line a line of every group would be waited for: up to twice the time.
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; v += kPanelVectors) {
    fetch_ahead<Rows, Vectors>(w.scales_of(first + v));
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) {
    const F scale = load(reinterpret_cast<const bf16*>(w.scales_of(first + v)));
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      add_group(total(sums[r][v]), scale * set(terms_at(terms + r * kTermBytes).scale), resume,
                c + r * kPanelColumns + (first + v) * kLanes);
    }
  }
}

// c[Rows][32] (+)= the product of `groups` groups; of one row with Panels panels at once.
template <int kBits, int Rows, int Panels = 1>
void multiply(const char* x, Source w, int64_t groups, float* c, bool resume) {
  static_assert(Rows == 1 || Panels == 1);
  constexpr int kVectors = Panels * kPanelVectors, kAtOnce = Rows == 1 ? kVectors : kPass<Rows>;
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 1
    for (int v = 0; v < kVectors; v += kAtOnce) {
      multiply_group<kBits, Rows, kAtOnce>(x, w, v, c, resume || g > 0);
    }
    x += Rows * kRowBytes;
    w.codes += w.codes_group;
    w.scales += w.scales_group;
  }
}

using Multiply = void (*)(const char*, Source, int64_t, float*, bool);

template <int kBits, int Rows = kRows>
Multiply multiply_for(int64_t rows) {
  if (rows == Rows) return multiply<kBits, Rows>;
  if constexpr (Rows > 1) return multiply_for<kBits, Rows - 1>(rows);
  return nullptr;
}

// A group of a row of x: zeros beyond K.
struct Group {
  int32_t x[kQuantGroup];
  Terms terms;
};

inline Group group_of(const LinearParams& p, int64_t m, int64_t g) {
  constexpr int kVectors = kQuantGroup / kLanes;
  const bf16* x = static_cast<const bf16*>(p.x) + m * p.x_m + g * kQuantGroup;
  const int64_t n = p.K - g * kQuantGroup;
  F v[kVectors];
  I largest_of{};
  for (int i = 0; i < kVectors; ++i) {
    v[i] = load_rest(x + i * kLanes, n - i * kLanes);
    // As integers, so that NaN is the largest of all.
    const I size = load_ints(&v[i]) & 0x7fffffff;
    largest_of = size > largest_of ? size : largest_of;
  }
  const int exponent = static_cast<int>(largest(to_floats(largest_of >> 23)));
  // Powers of two that a float holds: groups of the smallest numbers lose their last digits.
  const int e = exponent < 14 ? 14 : exponent;
  float up;
  const uint32_t up_bits = static_cast<uint32_t>(127 + 140 - e) << 23;
  const uint32_t down_bits = exponent == 255 ? 0x7fc00000u : static_cast<uint32_t>(e - 13) << 23;
  Group group;
  memcpy(&up, &up_bits, 4);
  memcpy(&group.terms.scale, &down_bits, 4);
  F all = set(0.0f);
  for (int i = 0; i < kVectors; ++i) {
    const F whole = exponent == 255 ? set(0.0f) : round_even(v[i] * set(up));
    const I ints = to_ints(whole);
    memcpy(group.x + i * kLanes, &ints, sizeof(ints));
    all = all + whole;
  }
  // At most 2^20: exact.
  group.terms.less = (p.format == WeightFormat::int8 ? -128 : -8) * static_cast<int32_t>(sum(all));
  return group;
}

// Groups of the blocks of rows [begin, end).
inline void prepare_blocks(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t groups = groups_of(p), most = block_rows(p);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t m = block * most, rows = least(p.M - m, most);
    for (int64_t g = 0; g < groups; ++g) {
      char* to = group_at(p, m, rows, g);
      for (int64_t r = 0; r < rows; ++r) {
        const Group group = group_of(p, m + r, g);
        for (int64_t q = 0; q < kQuads; ++q) {
          put_quad(group.x + 4 * q, to + (q * rows + r) * kQuadBytes);
        }
        memcpy(to + rows * kRowQuads + r * kTermBytes, &group.terms, kTermBytes);
      }
    }
  }
}

// Up to kRows rows are one block; a single row meets kStreams panels at once.
template <int kStreams>
void plan_block(LinearParams& p, int threads) {
  plan_chunks(p, p.M, p.M, p.M == 1 ? kStreams : 1, threads);
  p.items = 1;
  p.workspace_size = p.M * groups_of(p) * kRowBytes;
  p.scratch_size = p.M * p.panel_step * kPanelColumns * 4;
}

// A panel from group g on, as it is packed.
template <class Code>
Source packed_at(const LinearParams& p, int64_t panel, int64_t g) {
  const Code* group = panel_at<Code>(p, panel, g * kQuantGroup);
  const int64_t size = panel_bytes(p.format, kQuantGroup);
  return {reinterpret_cast<const char*>(codes_of(group)),
          reinterpret_cast<const char*>(scales_of(group)), size, size, panel_bytes(p.format, p.K)};
}

// A block of rows alone meets the codes as they come from memory.
template <class Code, int kStreams>
void one_block(const LinearParams& p, int64_t panel0, int64_t panel1, float* sums) {
  const int64_t groups = groups_of(p);
  const bool streams = kStreams > 1 && p.M == 1 && panel1 - panel0 == kStreams;
  const auto run = streams ? multiply<Code::kBits, 1, kStreams> : multiply_for<Code::kBits>(p.M);
  const int64_t panels = streams ? kStreams : 1;
  if (groups == 0) memset(sums, 0, static_cast<size_t>(p.M * panels * kPanelColumns) * 4);
  for (int64_t panel = panel0; panel < panel1; panel += panels) {
    run(group_at(p, 0, p.M, 0), packed_at<Code>(p, panel, 0), groups, sums, false);
    for (int64_t i = 0; i < panels; ++i) {
      finish(p, sums + i * kPanelColumns, kPanelColumns, 0, p.M, (panel + i) * kPanelColumns);
    }
  }
}

// run(W{}) for the kind of codes, W, that the weight has.
template <class Run>
void with_codes(WeightFormat format, Run&& run) {
  if (format == WeightFormat::int8) {
    run(Int8Codes{});
  } else {
    run(Int4Codes{});
  }
}

}  // namespace
}  // namespace ivr
