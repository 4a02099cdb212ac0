// linear on the CPU with fused multiply-adds (portable, AVX2, AVX-512, NEON).
//
// A group of up to kGroup rows times two vectors of columns is held in registers (12 x 32 on
// AVX-512, 12 x 8 on NEON, 6 x 16 on AVX2) while K goes by. x is widened to fp32 and interleaved
// once per call into the shared workspace (pieces of [groups][k][rows of the group]), so that the
// inner loop broadcasts from consecutive memory. K is walked in pieces of kDepth, whose sums are
// added in order: so a chunk's rows of x stay in L2 and a piece of a panel in L1. Up to kStreamRows
// rows, a step walks several panels at once: weights come from DRAM then, and more streams with
// prefetch read them faster than one (30 % measured).
//
// Quantised weights, which meet rows of fp32 here (bf16 ones in linear_codes.cpp), become fp32 in a
// small buffer before they are used, as bf16 weights do where many rows meet them.
#include "kernels/linear.h"

#include "kernels/cpu/linear_chunks.h"
#include "kernels/cpu/linear_codes.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

constexpr bool kManyRegisters = kRegisters == 32;
constexpr int kGroup = kManyRegisters ? 12 : 6;
constexpr int kStreamVectors = 8;
constexpr int kStreamRows = kManyRegisters ? 3 : 1;
constexpr int64_t kStreamAhead = 512;  // bytes, in each of several panels
constexpr int kPanelVectors = kPanelColumns / kLanes;
constexpr int64_t kRowBytes = kPanelColumns * 4;  // of a panel: a k of fp32, two of bf16
// In one panel alone; on AVX2 into L2, which gives two rows on Zen 4 1.3 times the rate of near and
// L1.
constexpr bool kFetchesFar = kLanes == 8;
constexpr int64_t kPanelAhead = kFetchesFar ? 16384 : 2048;
// Up to here a group's rows meet a whole panel at once: two vectors are too few for the
// multipliers.
constexpr int kFewRows = kLanes == 8 ? 2 : 0;
// Part of the result's definition: the same for every M and instruction set. 12 rows of x are 6 KB,
// a piece of a panel is 16 KB: both fit L1.
constexpr int64_t kDepth = 128;
constexpr int64_t kRowStep = 360;  // 184 KB of x: a piece of a panel is read from memory once
constexpr int64_t kPanelStep = 8;  // 368 KB of partial sums
// From here on a piece is copied once per chunk, in fp32: two rounds of it on AVX2, where a product
// with pairs runs out of registers.
constexpr int64_t kWidenRows = kLanes == 8 ? 12 : 36;

// x's depth in the workspace: pairs are whole.
inline int64_t even_depth(const LinearParams& p) {
  return p.dtype == DType::bf16 ? (p.K + 1) / 2 * 2 : p.K;
}

inline int64_t group_rows(const LinearParams& p) { return even_rows(p.M, kGroup); }

// Where a group's rows of x stand from k on, which begins a piece: the groups' parts of a piece lie
// one behind the other.
inline float* prepared(const LinearParams& p, int64_t m, int64_t k) {
  const int64_t K = least(kDepth, even_depth(p) - k);
  return static_cast<float*>(p.workspace) + k * p.M + m * K;
}

// Rows of a group whose multiply-adds load x each for itself instead of sharing one load. That
// saves an instruction and costs a load: with a third of the rows, a step of 12 x 32 has 36
// instructions and 18 loads in its 12 cycles. Where the core's sibling thread is busy this is 10 %
// faster than none (40 and 14) and 8 % faster than two thirds (32 and 22); alone the first two are
// level.
template <int Rows, int Vectors>
constexpr int kFused = kLanes == 16 && Vectors == 2 ? Rows / 3 : 0;

template <int Rows, int Vectors>
using Sums = F[Rows][Vectors];

// acc += a^T * w for one k, of which b(v) loads the vectors. The operand of which there is less is
// held in registers, the other passes by.
template <int Rows, int Vectors, class Load>
[[gnu::always_inline]] inline void accumulate(const float* a, const Load& b,
                                              Sums<Rows, Vectors>& acc) {
  if constexpr (Rows < Vectors) {
    F x[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) x[r] = set(a[r]);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const F y = b(v);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) acc[r][v] = fma(x[r], y, acc[r][v]);
    }
  } else {
    F y[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) y[v] = b(v);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#if defined(__AVX512F__)
      if (r < kFused<Rows, Vectors>) {
        for (int v = 0; v < Vectors; ++v) acc[r][v] = fma_from(a + r, y[v], acc[r][v]);
        continue;
      }
#endif
      const F x = set(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
  }
}

// What is fetched from memory while a product goes on: for each row of a panel, `step` bytes.
struct Ahead {
  const char* at;  // null: nothing
  int64_t step;

  // Vectors: those of a product, of panels that lie `panel` bytes apart.
  template <int Vectors>
  [[gnu::always_inline]] void fetch(int64_t panel) {
    if (!at) return;
    constexpr bool kNear = Vectors > kPanelVectors || (Vectors == kPanelVectors && !kFetchesFar);
    constexpr int kRow = Vectors < kPanelVectors ? Vectors * kLanes * 4 : kPanelColumns * 4;
#pragma GCC unroll 4
    for (int i = 0; i * kPanelVectors < Vectors; ++i) {
#pragma GCC unroll 2
      for (int line = 0; line < kRow; line += 64) {
        __builtin_prefetch(at + i * panel + line, 0, kNear ? 3 : 2);
      }
    }
    at += step;
  }
};

// acc += a[K][Rows]^T * w[K][...]. The vectors lie next to each other in the panel at w, then in
// the panels that follow it, `step` bytes apart.
template <int Rows, int Vectors>
[[gnu::always_inline]] inline void walk(const float* a, const float* w, int64_t step, int64_t K,
                                        Ahead ahead, Sums<Rows, Vectors>& acc) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k) {
    ahead.fetch<Vectors>(step);
    accumulate<Rows, Vectors>(
        a,
        [&](int v) {
          return load(beside(w, v / kPanelVectors * step) + v % kPanelVectors * kLanes);
        },
        acc);
    a += Rows;
    w += kPanelColumns;
  }
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void walk(const float* a, const bf16* w, int64_t step, int64_t K,
                                        Ahead ahead, Sums<Rows, Vectors>& acc) {
  const auto at = [step](const bf16* row, int v) {
    return beside(row, v / kPanelVectors * step) + v % kPanelVectors * kLanes * 2;
  };
  for (int64_t k = 0; k < K; k += 2) {
    ahead.fetch<Vectors>(step);
    accumulate<Rows, Vectors>(a, [&](int v) { return load_even(at(w, v)); }, acc);
    // With 16 registers it is better to load a pair twice than to keep it.
    if constexpr (!kManyRegisters) asm("" : "+r"(w));
    accumulate<Rows, Vectors>(a + Rows, [&](int v) { return load_odd(at(w, v)); }, acc);
    a += 2 * Rows;
    w += 2 * kPanelColumns;
  }
}

// Codes are decoded a few k of every panel at a time: 16 KB of fp32 at most. w begins a group.
template <int Rows, int Vectors, class Code>
[[gnu::always_inline]] inline void walk(const float* a, const Code* w, int64_t step, int64_t K,
                                        Ahead, Sums<Rows, Vectors>& acc) {
  constexpr int64_t kPanels = Vectors / kPanelVectors, kSome = 32, kSize = kSome * kPanelColumns;
  alignas(64) float made[kPanels * kSize];
  for (int64_t k = 0; k < K; k += kSome) {
    for (int64_t i = 0; i < kPanels; ++i) {
      decode(beside(w, i * step), k, kSome, made + i * kSize);
    }
    const float* some = made;
    walk<Rows, Vectors>(a + k * Rows, some, kSize * 4, least(kSome, K - k), Ahead{}, acc);
  }
}

// c[Rows][Vectors * kLanes] (+)= a^T * w.
template <int Rows, int Vectors, class W>
void multiply(const float* a, const W* w, int64_t step, int64_t K, float* c, int64_t c_m,
              bool resume, Ahead ahead) {
  Sums<Rows, Vectors> acc;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) acc[r][v] = set(0.0f);
  }
  walk<Rows, Vectors>(a, w, step, K, ahead, acc);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * c_m + v * kLanes;
      store(to, resume ? load(to) + acc[r][v] : acc[r][v]);
    }
  }
}

template <class W, int Vectors>
using Multiply = void (*)(const float*, const W*, int64_t, int64_t, float*, int64_t, bool, Ahead);

// The product of `rows` rows, at most Most, and Vectors vectors of columns.
template <class W, int Vectors, int Most>
Multiply<W, Vectors> multiply_for(int64_t rows) {
  if constexpr (Most > 1) {
    if (rows < Most) return multiply_for<W, Vectors, Most - 1>(rows);
  }
  return multiply<Most, Vectors, W>;
}

// One row of fp32 can be read where it is.
inline bool reads_x(const LinearParams& p) { return p.M == 1 && p.dtype == DType::f32; }

void plan(LinearParams& p, int threads) {
  if (p.M <= kStreamRows) {
    const int64_t panels = panel_count(p.N);
    p.row_step = p.M;
    p.row_blocks = 1;
    // Whole steps of kStreamVectors, and enough pieces for every thread where there are that many.
    const int64_t step = kStreamVectors / kPanelVectors > 0 ? kStreamVectors / kPanelVectors : 1;
    p.panel_step = panels >= 8 * step * threads ? step : 1;
    p.panel_blocks = ceil_div(panels, p.panel_step);
  } else {
    plan_chunks(p, kRowStep, group_rows(p), kPanelStep, threads);
  }
  p.items = reads_x(p) ? 0 : ceil_div(p.M, group_rows(p));
  p.workspace_size = reads_x(p) ? 0 : p.M * even_depth(p) * 4;
  const int64_t sums = p.M <= kStreamRows ? kGroup * kStreamVectors * kLanes
                                          : p.row_step * p.panel_step * kPanelColumns;
  p.scratch_size = (sums + kDepth * kPanelColumns) * 4;
}

// Rows of x, K of each, become [k][rows]. Whole squares are transposed in registers, and each line
// of x is touched once: rows a power of two apart would push each other out of L1. What a store
// writes beyond the rows is in the place of the next ones.
template <class T>
void interleave(const T* x, int64_t x_m, int64_t K, int64_t rows, float* to) {
  int64_t k = 0;
  if constexpr (kGroup <= kLanes) {
    for (; k + kLanes <= K; k += kLanes) {
      F v[kLanes];
      for (int r = 0; r < kLanes; ++r) v[r] = r < rows ? load(x + r * x_m + k) : set(0.0f);
      transpose(v);
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = (k + i) * rows;
        store_n(to + at, v[i], K * rows - at < kLanes ? rows : kLanes);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = k; i < K; ++i) to[i * rows + r] = to_float(x[r * x_m + i]);
  }
}

template <class T>
void interleave(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t depth = even_depth(p), step = group_rows(p);
  for (int64_t m = begin * step; m < least(end * step, p.M); m += step) {
    const int64_t rows = least(p.M - m, step);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t K = least(kDepth, p.K - k);
      float* to = prepared(p, m, k);
      interleave(static_cast<const T*>(p.x) + m * p.x_m + k, p.x_m, K, rows, to);
      if (p.K < depth && k + kDepth >= depth) {
        for (int64_t r = 0; r < rows; ++r) to[K * rows + r] = 0.0f;
      }
    }
  }
}

void prepare(const LinearParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::bf16) {
    interleave<bf16>(p, begin, end);
  } else {
    interleave<float>(p, begin, end);
  }
}

// One piece of a panel in fp32, [K][32].
inline void widen(const bf16* w, int64_t K, float* to) {
  for (int64_t k = 0; k < K; k += 2) {
    for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
      const bf16* pairs = w + k * kPanelColumns + 2 * j;
      store(to + k * kPanelColumns + j, load_even(pairs));
      store(to + (k + 1) * kPanelColumns + j, load_odd(pairs));
    }
  }
}
inline void widen(const float* w, int64_t K, float* to) {
  for (int64_t i = 0; i < K * kPanelColumns; i += kLanes) store(to + i, load(w + i));
}
template <class Code>
void widen(const Code* w, int64_t K, float* to) {
  decode(w, 0, K, to);
}

// How many products of a group with a panel take turns.
inline int64_t passes(int64_t rows) { return rows <= kFewRows ? 1 : kPanelVectors / 2; }

// A group's rows times a piece of one panel. made: where codes are widened to. The passes share in
// fetching what is ahead.
template <class W>
void multiply_panel(int64_t rows, const float* a, const W* w, int64_t K, float* c, int64_t c_m,
                    bool resume, Ahead ahead, float* made) {
  if constexpr (kIsCode<W>) {
    widen(w, K, made);
    multiply_panel<float>(rows, a, made, K, c, c_m, resume, Ahead{}, nullptr);
  } else {
    if constexpr (kFewRows > 0) {
      if (rows <= kFewRows) {
        const auto multiply_all = multiply_for<W, kPanelVectors, kFewRows>(rows);
        return multiply_all(a, w, 0, K, c, c_m, resume, ahead);
      }
    }
    const auto multiply_two = multiply_for<W, 2, kGroup>(rows);
    for (int v = 0; v < kPanelVectors; v += 2) {
      const int64_t j = v * kLanes;
      multiply_two(a, w + j * (sizeof(W) == 2 ? 2 : 1), 0, K, c + j, c_m, resume, ahead);
      if (ahead.at) ahead.at += ahead.step * K / (sizeof(W) == 2 ? 2 : 1);
    }
  }
}

template <class W>
void stream(const LinearParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t depth = even_depth(p), panels = panel_count(p.N);
  const float* a = static_cast<const float*>(reads_x(p) ? p.x : p.workspace);
  float* made = scratch;
  float* sums = scratch + kDepth * kPanelColumns;
  const auto wide = multiply_for<W, kStreamVectors, kStreamRows>(p.M);
  constexpr int64_t kStride = kStreamVectors * kLanes;
  constexpr int64_t kWidePanels = kStreamVectors / kPanelVectors;
  int64_t panel = begin * p.panel_step;
  const int64_t stop = least(end * p.panel_step, panels);
  while (panel < stop) {
    const int64_t done = stop - panel >= kWidePanels ? kWidePanels : 1;
    for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepth) {
      const int64_t K = least(kDepth, depth - k0);
      const W* w = panel_at<W>(p, panel, k0);
      const char* from = reinterpret_cast<const char*>(w);
      if (done == kWidePanels) {
        wide(a + k0 * p.M, w, panel_bytes(p.format, p.K), K, sums, kStride, k0 > 0,
             {from + kStreamAhead, kRowBytes});
      } else {
        multiply_panel(p.M, a + k0 * p.M, w, K, sums, kStride, k0 > 0,
                       {from + kPanelAhead, kRowBytes / passes(p.M)}, made);
      }
    }
    for (int64_t i = 0; i < done; ++i, ++panel) {
      finish(p, sums + i * kPanelColumns, kStride, 0, p.M, panel * kPanelColumns);
    }
  }
}

// One piece of a panel for a chunk's rows, widened first where there is room for it. next: the
// piece that comes after this one, to be fetched meanwhile.
template <class W>
void compute_piece(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel, int64_t k0,
                   const W* next, float* sums, float* wide) {
  const int64_t depth = even_depth(p), K = least(kDepth, depth - k0);
  const W* w = panel_at<W>(p, panel, k0);
  const int64_t step = group_rows(p), groups = ceil_div(m1 - m0, step);
  const int64_t share = ceil_div(panel_bytes(p.format, kDepth), groups * 64) * 64;
  const char* ahead = reinterpret_cast<const char*>(next);
  if (wide) widen(w, K, wide);
  for (int64_t m = m0; m < m1; m += step) {
    const int64_t rows = least(p.M - m, step);
    const float* a = prepared(p, m, k0);
    float* c = sums + (m - m0) * kPanelColumns;
    if (wide) {
      for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      multiply_panel<float>(rows, a, wide, K, c, kPanelColumns, k0 > 0, Ahead{}, nullptr);
    } else {
      const int64_t all = groups * passes(rows);
      const char* from = all > 1 ? ahead : reinterpret_cast<const char*>(w) + kPanelAhead;
      multiply_panel(rows, a, w, K, c, kPanelColumns, k0 > 0, {from, kRowBytes / all}, nullptr);
    }
    ahead += share;
    if (k0 + K >= depth) finish(p, c, kPanelColumns, m, rows, panel * kPanelColumns);
  }
}

template <class W>
void compute_chunk(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1,
                   float* scratch) {
  const int64_t depth = even_depth(p);
  float* wide = scratch;
  float* sums = scratch + kDepth * kPanelColumns;
  // Either way at least one piece: the epilogue of a product over nothing.
  if (m1 - m0 < kWidenRows) {
    // Few rows: the weights pass once, in the order of memory.
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepth) {
        const W* next = panel_at<W>(p, panel, k0 + kDepth);
        compute_piece<W>(p, m0, m1, panel, k0, next, sums, kIsCode<W> ? wide : nullptr);
      }
    }
    return;
  }
  for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepth) {
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      const bool last = panel + 1 == panel1;
      const W* next = panel_at<W>(p, last ? panel0 : panel + 1, last ? k0 + kDepth : k0);
      compute_piece<W>(p, m0, m1, panel, k0, next,
                       sums + (panel - panel0) * p.row_step * kPanelColumns, wide);
    }
  }
}

template <class W>
void run(const LinearParams& p, int64_t begin, int64_t end, float* scratch) {
  if (p.M <= kStreamRows) return stream<W>(p, begin, end, scratch);
  for_chunks(p, begin, end, [&](int64_t m0, int64_t m1, int64_t panel0, int64_t panel1) {
    compute_chunk<W>(p, m0, m1, panel0, panel1, scratch);
  });
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  float* memory = static_cast<float*>(scratch);
  switch (p.format) {
    case WeightFormat::int8:
      return run<Int8Codes>(p, begin, end, memory);
    case WeightFormat::int4:
      return run<Int4Codes>(p, begin, end, memory);
    case WeightFormat::bf16:
      return run<bf16>(p, begin, end, memory);
    default:
      return run<float>(p, begin, end, memory);
  }
}

// [32 rows][words] -> [words][32]: a word is one float or a pair of bf16.
void transpose_rows(const void* const* rows, int64_t words, uint32_t* to) {
  constexpr int64_t kBlock = 16;  // one cache line of each row at a time
  for (int64_t k0 = 0; k0 < words; k0 += kBlock) {
    const int64_t n = least(kBlock, words - k0);
    for (int64_t r = 0; r < kPanelColumns; r += kLanes) {
      for (int64_t k = k0; k < k0 + n; k += kLanes) {
        const int64_t some = least(kLanes, k0 + n - k);
        F v[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const float* row = static_cast<const float*>(rows[r + i]);
          v[i] = row ? load_n(row + k, some) : set(0.0f);
        }
        transpose(v);
        for (int64_t i = 0; i < some; ++i) {
          store(reinterpret_cast<float*>(to) + (k + i) * kPanelColumns + r, v[i]);
        }
      }
    }
  }
}

}  // namespace

namespace IVR_ISA {

void linear(LinearSteps& steps) { steps = {plan, prepare, compute}; }

void pack_panel(const void* const* rows, int64_t K, WeightFormat format, void* panel) {
  uint32_t* to = static_cast<uint32_t*>(panel);
  if (format == WeightFormat::f32) return transpose_rows(rows, K, to);
  transpose_rows(rows, K / 2, to);
  bf16* tail = reinterpret_cast<bf16*>(to + K / 2 * kPanelColumns);
  memset(tail, 0, static_cast<size_t>(panel_size(format, K) - K / 2 * 2 * kPanelColumns) * 2);
  if (K % 2) {
    for (int64_t r = 0; r < kPanelColumns; ++r) {
      if (rows[r]) tail[2 * r] = static_cast<const bf16*>(rows[r])[K - 1];
    }
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
