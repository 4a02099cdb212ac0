// linear on AVX-512's integer dot product: bf16 rows times the codes of an int8 or int4 weight.
//
// A group of 64 values of x becomes integers X = 256 * high + low, two digits of 8 bits, times a
// power of two: |X| < 2^14, so that a value is exact unless it is 64 times smaller than the largest
// of its group, and then off by at most 2^-15 of that one's power of two. Four codes of a column
// meet four digits in one instruction, 32 bits wide and exact. The sum of a group, less what the
// codes' offset brought in, becomes fp32 and is added times both scales: one chain of fused
// multiply-adds over the groups per element, for every number of rows. Codes are never turned into
// numbers. NaN and infinities make a group's scale NaN.
//
// Up to kRows rows meet the codes as they come from memory, one panel after the other; more rows
// take a piece of a panel at a time, int4 spread to bytes, as in linear_dot.cpp.
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
constexpr int64_t kRowStep = 360;
constexpr int64_t kPanelStep = 8;
constexpr int64_t kFewRows = 36;  // below, the weights pass once, in the order of memory
// Bytes of the stream that are fetched in advance, into L2: farther, into L1, or with several
// streams is up to 40 % slower.
constexpr int64_t kAhead = 1024;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
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
};

inline __m512i load_line(const char* p) { return _mm512_loadu_si512(p); }

// Sums of 16 columns. Not __m512i, which gcc 12 takes for eight numbers: it copies and spills the
// sums of a loop then, at half the rate.
typedef int32_t Sums __attribute__((vector_size(64)));

// sum += u8 * s8 over the four of each lane, for the digits at x.
inline Sums dot_bytes(Sums sum, __m512i codes, const char* x) {
  int32_t quad;
  memcpy(&quad, x, 4);
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, codes, _mm512_set1_epi32(quad));
}

// c[Rows][32] (+)= the product of `groups` groups.
template <bool Nibbles, int Rows>
void multiply(const char* x, Source w, int64_t groups, float* c, bool resume) {
  constexpr int kVectors = kPanelVectors;
  constexpr int kHalves = Nibbles ? 2 : 1;
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g) {
    const char* terms = x + Rows * kDigitBytes;
    Sums high[Rows][kVectors], low[Rows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      int32_t less;
      memcpy(&less, terms + 8 * r, 4);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        high[r][v] = Sums{};
        low[r][v] = Sums{} + less;
      }
    }
    for (int64_t q = 0; q < kQuads; q += kHalves) {
      __m512i u[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const char* at = w.codes + q / kHalves * kPanelColumns * 4 + v * 64;
        __builtin_prefetch(at + kAhead, 0, 2);
        u[v] = load_line(at);
      }
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half, x += Rows * 8) {
        __m512i b[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          b[v] =
              !Nibbles ? u[v] : _mm512_and_si512(half ? _mm512_srli_epi32(u[v], 4) : u[v], nibble);
        }
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            high[r][v] = dot_bytes(high[r][v], b[v], x + 8 * r);
            low[r][v] = dot_bytes(low[r][v], b[v], x + 8 * r + 4);
          }
        }
      }
    }
    F scale[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = load(reinterpret_cast<const bf16*>(w.scales + v * 32));
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      float factor;
      memcpy(&factor, terms + 8 * r + 4, 4);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512i sum = (__m512i)((high[r][v] << 8) + low[r][v]);
        float* to = c + r * kPanelColumns + v * kLanes;
        const F before = resume || g > 0 ? load(to) : set(0.0f);
        store(to, fma(F{_mm512_cvtepi32_ps(sum)}, scale[v] * set(factor), before));
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

void plan(LinearParams& p, int threads) {
  const int64_t panels = panel_count(p.N);
  if (p.M <= kRows) {
    p.row_step = p.M;
    p.row_blocks = 1;
    p.panel_step = 1;
  } else {
    // Even blocks, whole blocks of rows.
    const int64_t blocks = ceil_div(p.M, kRowStep);
    p.row_step = ceil_div(ceil_div(p.M, blocks), block_rows(p)) * block_rows(p);
    p.row_blocks = ceil_div(p.M, p.row_step);
    p.panel_step = kPanelStep;
    while (p.panel_step > 1 && p.row_blocks * ceil_div(panels, p.panel_step) < 6 * threads) {
      p.panel_step /= 2;
    }
  }
  p.panel_blocks = ceil_div(panels, p.panel_step);
  p.items = ceil_div(p.M, block_rows(p));
  p.workspace_size = p.M * groups_of(p) * kRowBytes;
  const int64_t sums = p.row_step * p.panel_step * kPanelColumns;
  p.scratch_size = sums * 4 + kPieceGroups * kGroupCodes;
}

// One group of a row: digits, 8 * rows bytes from quad to quad, and its two terms.
void take_digits(const bf16* x, int64_t n, int32_t offset, char* digits, int64_t rows,
                 char* terms) {
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
    for (int64_t q = 0; q < kLanes; q += 4, digits += 8 * rows) {
      memcpy(digits, quads[0] + q, 4);
      memcpy(digits + 4, quads[1] + q, 4);
    }
  }
  const int32_t less = -offset * _mm512_reduce_add_epi32(total);
  memcpy(terms, &less, 4);
  memcpy(terms + 4, &down, 4);
}

void prepare(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t groups = groups_of(p), most = block_rows(p);
  const int32_t offset = p.format == WeightFormat::int8 ? 128 : 8;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t m = block * most, rows = least(p.M - m, most);
    for (int64_t g = 0; g < groups; ++g) {
      char* to = group_at(p, m, rows, g);
      for (int64_t r = 0; r < rows; ++r) {
        const bf16* x = static_cast<const bf16*>(p.x) + (m + r) * p.x_m + g * kQuantGroup;
        take_digits(x, p.K - g * kQuantGroup, offset, to + 8 * r, rows,
                    to + rows * kDigitBytes + 8 * r);
      }
    }
  }
}

// A panel from group g on, as it is packed.
template <class Code>
Source packed_at(const LinearParams& p, int64_t panel, int64_t g) {
  const Code* group = panel_at<Code>(p, panel, g * kQuantGroup);
  const int64_t size = panel_bytes(p.format, kQuantGroup);
  return {reinterpret_cast<const char*>(codes_of(group)),
          reinterpret_cast<const char*>(scales_of(group)), size, size};
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

// One block of rows meets its panels.
template <class Code>
void one_block(const LinearParams& p, int64_t panel0, int64_t panel1, float* sums) {
  const int64_t groups = groups_of(p);
  if (groups == 0) memset(sums, 0, static_cast<size_t>(p.M * kPanelColumns) * 4);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    multiply_for<Code::kBits == 4>(p.M)(group_at(p, 0, p.M, 0), packed_at<Code>(p, panel, 0),
                                        groups, sums, false);
    finish(p, sums, kPanelColumns, 0, p.M, panel * kPanelColumns);
  }
}

// A piece of every panel, then the next piece: the rows of x stay in L2. Few rows stay there
// anyway, and take one panel after the other in the order of memory.
template <class Code>
void blocks(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1,
            char* made, float* sums) {
  const int64_t all = groups_of(p), panels = panel1 - panel0, most = block_rows(p);
  const int64_t pieces = all == 0 ? 1 : ceil_div(all, kPieceGroups);
  const bool few = m1 - m0 < kFewRows;
  if (all == 0) memset(sums, 0, static_cast<size_t>((m1 - m0) * panels * kPanelColumns) * 4);
  for (int64_t i = 0; i < pieces * panels; ++i) {
    const int64_t panel = few ? i / pieces : i % panels;
    const int64_t g = (few ? i % pieces : i / panels) * kPieceGroups;
    const int64_t groups = least(kPieceGroups, all - g);
    const Source w = bytes_at<Code>(p, panel0 + panel, g, groups, made);
    for (int64_t m = m0; m < m1; m += most) {
      const int64_t rows = least(m1 - m, most);
      float* c = sums + (panel * (m1 - m0) + m - m0) * kPanelColumns;
      multiply_for<false>(rows)(group_at(p, m, rows, g), w, groups, c, g > 0);
      if (g + groups >= all) finish(p, c, kPanelColumns, m, rows, (panel0 + panel) * kPanelColumns);
    }
  }
}

template <class Code>
void run(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t panels = panel_count(p.N);
  char* made = static_cast<char*>(scratch);
  float* sums = reinterpret_cast<float*>(made + kPieceGroups * kGroupCodes);
  for (int64_t i = begin; i < end; ++i) {
    // Rows go first, so that neighbours in time share weights.
    const int64_t m = i % p.row_blocks * p.row_step, panel = i / p.row_blocks * p.panel_step;
    const int64_t last = least(panel + p.panel_step, panels);
    if (p.M <= kRows) {
      one_block<Code>(p, panel, last, sums);
    } else {
      blocks<Code>(p, m, least(m + p.row_step, p.M), panel, last, made, sums);
    }
  }
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  if (p.format == WeightFormat::int8) {
    run<Int8Codes>(p, begin, end, scratch);
  } else {
    run<Int4Codes>(p, begin, end, scratch);
  }
}

}  // namespace

namespace IVR_ISA {

void linear_codes_dot(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
