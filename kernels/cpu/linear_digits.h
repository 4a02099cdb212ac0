// Products of bf16 rows with the codes of an int8 or int4 weight, and those of a few rows, on
// AVX-512's integer dot product.
//
// A group of 64 values of x becomes integers X = 256 * high + low, two digits of 8 bits, times a
// power of two: |X| < 2^14, so that a value is exact unless it is 64 times smaller than the largest
// of its group, and then off by at most 2^-15 of that one's power of two. Four codes of a column
// meet four digits in one instruction, 32 bits wide and exact. The sum of a group, less what the
// codes' offset brought in, becomes fp32 and is added times both scales: one chain of fused
// multiply-adds over the groups per element, for every number of rows. Codes are never turned into
// numbers. NaN and infinities make a group's scale NaN.
#pragma once

#include "kernels/cpu/linear_chunks.h"
#include "kernels/cpu/linear_codes.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/simd.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

constexpr int64_t kRows = 6;  // x 2 vectors x 2 digits: 24 registers of sums
constexpr int64_t kPanelVectors = kPanelColumns / kLanes;
constexpr int64_t kQuads = kQuantGroup / 4;
constexpr int64_t kPieceGroups = 8;  // a piece of a panel is 16 KB of bytes
constexpr int64_t kGroupCodes = kQuantGroup * kPanelColumns;
// Bytes of a stream that are fetched in advance: of one into L2 (on Zen 4 farther, into L1 or with
// several streams is up to 40 % slower), of several into L1.
constexpr int64_t kAhead = 1024;
constexpr int64_t kAheadOfMany = 512;

inline int64_t groups_of(const LinearParams& p) { return ceil_div(p.K, kQuantGroup); }

// Rows of a block, the last one's aside: even where there are few.
inline int64_t block_rows(const LinearParams& p) { return ceil_div(p.M, ceil_div(p.M, kRows)); }

// A group of x for a block of rows: digits [quad][row][high, low][4], then for every row what the
// codes' offset adds to the sum, and the scale.
constexpr int64_t kDigitBytes = kQuads * 8;
constexpr int64_t kRowBytes = kDigitBytes + 8;

inline char* group_at(const LinearParams& p, int64_t m, int64_t rows, int64_t g) {
  return static_cast<char*>(p.workspace) + (m * groups_of(p) + g * rows) * kRowBytes;
}

// Where a panel's codes lie, group after group: packed, or spread to bytes.
struct Source {
  const char* codes;
  const char* scales;
  int64_t codes_group, scales_group;  // bytes from one group to the next
  int64_t panel;                      // bytes from one panel to the next
};

inline __m512i load_line(const char* p) { return _mm512_loadu_si512(p); }

// Sums of 16 columns. Not __m512i, which gcc 12 takes for eight numbers: it copies and spills the
// sums of a loop then, at half the rate.
typedef int32_t Sums __attribute__((vector_size(64)));

// sum += u8 * s8 over the four of each lane, for the digits at x.
inline Sums dot_bytes(Sums sum, __m512i codes, const char* x) {
  int32_t quad;
  memcpy(&quad, x, 4);
  const __m512i digits = _mm512_set1_epi32(quad);
#if defined(__AVX512VNNI__)
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, codes, digits);
#else
  // For software tiles.
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(digits, 8), 8);
  const __m512i low = _mm512_and_si512(codes, _mm512_set1_epi16(255));
  return sum + (Sums)_mm512_madd_epi16(low, even) +
         (Sums)_mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(digits, 8));
#endif
}

inline Sums load_sums(const char* p) { return (Sums)load_line(p); }

// *to (+)= the sum of a group, times both scales.
inline void add_group(Sums high, Sums low, F scale, bool resume, float* to) {
  const F sum = {_mm512_cvtepi32_ps((__m512i)((high << 8) + low))};
  store(to, fma(sum, scale, resume ? load(to) : set(0.0f)));
}

// c[Rows][32] (+)= the product of `groups` groups; of one row with Panels panels at once.
template <bool Nibbles, int Rows, int Panels = 1>
void multiply(const char* x, Source w, int64_t groups, float* c, bool resume) {
  static_assert(Rows == 1 || Panels == 1);
  constexpr int kVectors = Panels * kPanelVectors;
  constexpr int kHalves = Nibbles ? 2 : 1;
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g) {
    const char* terms = x + Rows * kDigitBytes;
    Sums high[Rows][kVectors], low[Rows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      int32_t less;
      memcpy(&less, terms + 8 * r, 4);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        high[r][v] = Sums{};
        low[r][v] = Sums{} + less;
      }
    }
    for (int64_t q = 0; q < kQuads; q += kHalves) {
      __m512i u[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const char* at = w.codes + v / kPanelVectors * w.panel + q / kHalves * kPanelColumns * 4 +
                         v % kPanelVectors * 64;
        if constexpr (Panels == 1) {
          __builtin_prefetch(at + kAhead, 0, 2);
        } else {
          __builtin_prefetch(at + kAheadOfMany);
        }
        u[v] = load_line(at);
      }
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half, x += Rows * 8) {
        __m512i b[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          b[v] =
              !Nibbles ? u[v] : _mm512_and_si512(half ? _mm512_srli_epi32(u[v], 4) : u[v], nibble);
        }
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            high[r][v] = dot_bytes(high[r][v], b[v], x + 8 * r);
            low[r][v] = dot_bytes(low[r][v], b[v], x + 8 * r + 4);
          }
        }
      }
    }
    F scale[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const char* scales = w.scales + v / kPanelVectors * w.panel;
      scale[v] = load(reinterpret_cast<const bf16*>(scales) + v % kPanelVectors * kLanes);
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      float factor;
      memcpy(&factor, terms + 8 * r + 4, 4);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        add_group(high[r][v], low[r][v], scale[v] * set(factor), resume || g > 0,
                  c + r * kPanelColumns + v * kLanes);
      }
    }
    x = terms + Rows * 8;
    w.codes += w.codes_group;
    w.scales += w.scales_group;
  }
}

using Multiply = void (*)(const char*, Source, int64_t, float*, bool);

template <bool Nibbles, int Rows = kRows>
Multiply multiply_for(int64_t rows) {
  if (rows == Rows) return multiply<Nibbles, Rows>;
  if constexpr (Rows > 1) return multiply_for<Nibbles, Rows - 1>(rows);
  return nullptr;
}

// Where a row's group goes: its digits, `quad` bytes from four of them to the next four, and terms.
struct DigitsAt {
  char *high, *low;
  int64_t quad;
  char *less, *factor;
};

// Group g of row m; zeros beyond K.
inline void take_digits(const LinearParams& p, int64_t m, int64_t g, DigitsAt to) {
  const bf16* x = static_cast<const bf16*>(p.x) + m * p.x_m + g * kQuantGroup;
  const int64_t n = p.K - g * kQuantGroup;
  const int32_t offset = p.format == WeightFormat::int8 ? 128 : 8;
  F v[kQuantGroup / kLanes];
  F largest_of = set(0.0f);
  for (int64_t i = 0; i < kQuantGroup / kLanes; ++i) {
    const int64_t here = n - i * kLanes;
    v[i] = load_n(x + i * kLanes, here < 0 ? 0 : least(here, kLanes));
    const __m512 size = _mm512_abs_ps(v[i].v);
    // As integers, so that NaN is the largest of all.
    largest_of.v = _mm512_castsi512_ps(
        _mm512_max_epu32(_mm512_castps_si512(size), _mm512_castps_si512(largest_of.v)));
  }
  const int exponent =
      static_cast<int>(_mm512_reduce_max_epu32(_mm512_castps_si512(largest_of.v)) >> 23);
  // Powers of two that a float holds: groups of the smallest numbers lose their last digits.
  const int e = exponent < 14 ? 14 : exponent;
  float up, down;
  const uint32_t up_bits = static_cast<uint32_t>(127 + 140 - e) << 23;
  const uint32_t down_bits = exponent == 255 ? 0x7fc00000u : static_cast<uint32_t>(e - 13) << 23;
  memcpy(&up, &up_bits, 4);
  memcpy(&down, &down_bits, 4);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < kQuantGroup / kLanes; ++i) {
    __m512i all = _mm512_setzero_si512();
    if (exponent != 255) all = _mm512_cvtps_epi32((v[i] * set(up)).v);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(all, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(all, _mm512_slli_epi32(high, 8));
    total = _mm512_add_epi32(total, all);
    alignas(16) char quads[2][kLanes];
    _mm_store_si128(reinterpret_cast<__m128i*>(quads[0]), _mm512_cvtepi32_epi8(high));
    _mm_store_si128(reinterpret_cast<__m128i*>(quads[1]), _mm512_cvtepi32_epi8(low));
    for (int64_t q = 0; q < kLanes; q += 4, to.high += to.quad, to.low += to.quad) {
      memcpy(to.high, quads[0] + q, 4);
      memcpy(to.low, quads[1] + q, 4);
    }
  }
  const int32_t less = -offset * _mm512_reduce_add_epi32(total);
  memcpy(to.less, &less, 4);
  memcpy(to.factor, &down, 4);
}

// Digits of the blocks of rows [begin, end).
inline void prepare_blocks(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t groups = groups_of(p), most = block_rows(p);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t m = block * most, rows = least(p.M - m, most);
    for (int64_t g = 0; g < groups; ++g) {
      char* to = group_at(p, m, rows, g);
      char* terms = to + rows * kDigitBytes;
      for (int64_t r = 0; r < rows; ++r, to += 8, terms += 8) {
        take_digits(p, m + r, g, {to, to + 4, 8 * rows, terms, terms + 4});
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

// The same for many rows: bytes, which int4's nibbles become at `made`.
template <class Code>
Source bytes_at(const LinearParams& p, int64_t panel, int64_t g, int64_t groups, char* made) {
  Source w = packed_at<Code>(p, panel, g);
  if constexpr (Code::kBits == 8) return w;
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < groups; ++i) {
    const char* from = w.codes + i * w.codes_group;
    char* to = made + i * kGroupCodes;
    for (int64_t line = 0; line < kGroupCodes / 128; ++line) {
      __builtin_prefetch(from + line * 64 + kAhead, 0, 2);
      const __m512i u = load_line(from + line * 64);
      char* quads = to + line / kPanelVectors * 256 + line % kPanelVectors * 64;
      _mm512_storeu_si512(quads, _mm512_and_si512(u, nibble));
      _mm512_storeu_si512(quads + 128, _mm512_and_si512(_mm512_srli_epi32(u, 4), nibble));
    }
  }
  w.codes = made;
  w.codes_group = kGroupCodes;
  return w;
}

// A block of rows alone meets the codes as they come from memory.
template <class Code, int kStreams>
void one_block(const LinearParams& p, int64_t panel0, int64_t panel1, float* sums) {
  constexpr bool kNibbles = Code::kBits == 4;
  const int64_t groups = groups_of(p);
  const bool streams = kStreams > 1 && p.M == 1 && panel1 - panel0 == kStreams;
  const auto run = streams ? multiply<kNibbles, 1, kStreams> : multiply_for<kNibbles>(p.M);
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
