// linear on the CPU with fused multiply-adds (portable, AVX2, AVX-512).
//
// A group of up to kGroup rows times two vectors of columns is held in registers (12 x 32 on
// AVX-512, 6 x 16 on AVX2) while K goes by. x is widened to fp32 and interleaved once per call into
// the shared workspace ([groups][K][rows of the group]), so that the inner loop broadcasts from
// consecutive memory. K is walked in pieces of kDepth, whose sums are added in order: so a chunk's
// rows of x stay in L2 and a piece of a panel in L1. Up to kStreamRows rows, a step walks several
// panels at once: weights come from DRAM then, and more streams with prefetch read them faster than
// one (30 % measured).
//
// Quantised weights become fp32 in a small buffer before they are used, as bf16 ones do where many
// rows meet them.
#include "kernels/linear.h"

#include "kernels/cpu/linear_chunks.h"
#include "kernels/cpu/linear_codes.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

#if defined(__AVX512F__)
constexpr int kGroup = 12;
constexpr int kStreamVectors = 8;
constexpr int kStreamRows = 3;
#else
constexpr int kGroup = 6;
constexpr int kStreamVectors = 8;
constexpr int kStreamRows = 1;
#endif
// Several streams need to look less far ahead than one.
template <int Vectors>
constexpr int kPrefetchBytes = Vectors == 2 ? 2048 : 512;
constexpr int kPanelVectors = kPanelColumns / kLanes;
// Part of the result's definition: the same for every M and instruction set. 12 rows of x are 6 KB,
// a piece of a panel is 16 KB: both fit L1.
constexpr int64_t kDepth = 128;
constexpr int64_t kRowStep = 360;   // 184 KB of x: a piece of a panel is read from memory once
constexpr int64_t kPanelStep = 8;   // 368 KB of partial sums
constexpr int64_t kWidenRows = 36;  // from here on a piece is copied once per chunk, in fp32

// x's depth in the workspace: pairs are whole.
inline int64_t even_depth(const LinearParams& p) {
  return p.dtype == DType::bf16 ? (p.K + 1) / 2 * 2 : p.K;
}

// Rows of a group: even groups, for one of few rows keeps the multipliers waiting.
inline int64_t group_rows(const LinearParams& p) {
  const int64_t groups = ceil_div(p.M, kGroup);
  return groups > 0 ? ceil_div(p.M, groups) : 1;
}

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

template <int Vectors>
inline void accumulate(const float* x, bool fused, const F* b, F* acc) {
#if defined(__AVX512F__)
  if (fused) {
    for (int v = 0; v < Vectors; ++v) acc[v] = fma_from(x, b[v], acc[v]);
    return;
  }
#endif
  (void)fused;
  const F a = set(*x);
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) acc[v] = fma(a, b[v], acc[v]);
}

template <int Rows, int Vectors>
using Sums = F[Rows][Vectors];

// acc += a[K][Rows]^T * w[K][...]. The vectors lie next to each other in the panel at w, then in
// the panels that follow it, `step` bytes apart.
template <int Rows, int Vectors>
[[gnu::always_inline]] inline void walk(const float* a, const float* w, int64_t step, int64_t K,
                                        bool stream, Sums<Rows, Vectors>& acc) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k) {
    F b[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const float* at = beside(w, v / kPanelVectors * step) + (v % kPanelVectors) * kLanes;
      if (stream) __builtin_prefetch(at + kPrefetchBytes<Vectors> / 4);
      b[v] = load(at);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      accumulate<Vectors>(a + r, r < kFused<Rows, Vectors>, b, acc[r]);
    }
    a += Rows;
    w += kPanelColumns;
  }
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void walk(const float* a, const bf16* w, int64_t step, int64_t K,
                                        bool stream, Sums<Rows, Vectors>& acc) {
  for (int64_t k = 0; k < K; k += 2) {
    F even[Vectors], odd[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const bf16* at = beside(w, v / kPanelVectors * step) + (v % kPanelVectors) * kLanes * 2;
      if (stream) __builtin_prefetch(at + kPrefetchBytes<Vectors> / 2);
      load_pairs(at, even[v], odd[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      accumulate<Vectors>(a + r, r < kFused<Rows, Vectors>, even, acc[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      accumulate<Vectors>(a + Rows + r, r < kFused<Rows, Vectors>, odd, acc[r]);
    }
    a += 2 * Rows;
    w += 2 * kPanelColumns;
  }
}

// Codes are decoded a few k of every panel at a time: 16 KB of fp32 at most. w begins a group.
template <int Rows, int Vectors, class Code>
[[gnu::always_inline]] inline void walk(const float* a, const Code* w, int64_t step, int64_t K,
                                        bool, Sums<Rows, Vectors>& acc) {
  constexpr int64_t kPanels = Vectors / kPanelVectors, kSome = 32, kSize = kSome * kPanelColumns;
  alignas(64) float made[kPanels * kSize];
  for (int64_t k = 0; k < K; k += kSome) {
    for (int64_t i = 0; i < kPanels; ++i) {
      decode(beside(w, i * step), k, kSome, made + i * kSize);
    }
    const float* some = made;
    walk<Rows, Vectors>(a + k * Rows, some, kSize * 4, least(kSome, K - k), false, acc);
  }
}

// c[Rows][Vectors * kLanes] (+)= a^T * w.
template <int Rows, int Vectors, class W>
void multiply(const float* a, const W* w, int64_t step, int64_t K, float* c, int64_t c_m,
              bool resume, bool stream) {
  Sums<Rows, Vectors> acc;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) acc[r][v] = set(0.0f);
  }
  walk<Rows, Vectors>(a, w, step, K, stream, acc);
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
using Multiply = void (*)(const float*, const W*, int64_t, int64_t, float*, int64_t, bool, bool);

// The product of `rows` rows (1 to kGroup) and Vectors vectors of columns.
template <class W, int Vectors>
Multiply<W, Vectors> multiply_for(int64_t rows) {
  if (rows == 1) return multiply<1, Vectors, W>;
  if constexpr (Vectors == 2 || kStreamRows == 3) {
    if (rows == 2) return multiply<2, Vectors, W>;
    if (rows == 3) return multiply<3, Vectors, W>;
  }
  if constexpr (Vectors == 2) {
    switch (rows) {
      case 4:
        return multiply<4, 2, W>;
      case 5:
        return multiply<5, 2, W>;
      case 6:
        return multiply<6, 2, W>;
    }
    if constexpr (kGroup == 12) {
      switch (rows) {
        case 7:
          return multiply<7, 2, W>;
        case 8:
          return multiply<8, 2, W>;
        case 9:
          return multiply<9, 2, W>;
        case 10:
          return multiply<10, 2, W>;
        case 11:
          return multiply<11, 2, W>;
        default:
          return multiply<12, 2, W>;
      }
    }
  }
  return nullptr;
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
      F even, odd;
      load_pairs(w + k * kPanelColumns + 2 * j, even, odd);
      store(to + k * kPanelColumns + j, even);
      store(to + (k + 1) * kPanelColumns + j, odd);
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

// A group's rows times a piece of one panel. made: where codes are widened to.
template <class W>
void multiply_panel(int64_t rows, const float* a, const W* w, int64_t K, float* c, int64_t c_m,
                    bool resume, bool stream, float* made) {
  if constexpr (kIsCode<W>) {
    widen(w, K, made);
    multiply_panel<float>(rows, a, made, K, c, c_m, resume, false, nullptr);
  } else {
    for (int v = 0; v < kPanelVectors; v += 2) {
      const int64_t j = v * kLanes;
      multiply_for<W, 2>(rows)(a, w + j * (sizeof(W) == 2 ? 2 : 1), 0, K, c + j, c_m, resume,
                               stream);
    }
  }
}

template <class W>
void stream(const LinearParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t depth = even_depth(p), panels = panel_count(p.N);
  const float* a = static_cast<const float*>(reads_x(p) ? p.x : p.workspace);
  float* made = scratch;
  float* sums = scratch + kDepth * kPanelColumns;
  const auto wide = multiply_for<W, kStreamVectors>(p.M);
  constexpr int64_t kStride = kStreamVectors * kLanes;
  constexpr int64_t kWidePanels = kStreamVectors / kPanelVectors;
  int64_t panel = begin * p.panel_step;
  const int64_t stop = least(end * p.panel_step, panels);
  while (panel < stop) {
    const int64_t done = stop - panel >= kWidePanels ? kWidePanels : 1;
    for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepth) {
      const int64_t K = least(kDepth, depth - k0);
      const W* w = panel_at<W>(p, panel, k0);
      if (done == kWidePanels) {
        wide(a + k0 * p.M, w, panel_bytes(p.format, p.K), K, sums, kStride, k0 > 0, true);
      } else {
        multiply_panel(p.M, a + k0 * p.M, w, K, sums, kStride, k0 > 0, true, made);
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
  const char* ahead = reinterpret_cast<const char*>(next);
  const int64_t step = group_rows(p), groups = ceil_div(m1 - m0, step);
  const int64_t share = ceil_div(panel_bytes(p.format, kDepth), groups * 64) * 64;
  if (wide) widen(w, K, wide);
  for (int64_t m = m0; m < m1; m += step) {
    const int64_t rows = least(p.M - m, step);
    const float* a = prepared(p, m, k0);
    float* c = sums + (m - m0) * kPanelColumns;
    if (next) {
      for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      ahead += share;
    }
    if (wide) {
      multiply_panel<float>(rows, a, wide, K, c, kPanelColumns, k0 > 0, false, nullptr);
    } else {
      multiply_panel(rows, a, w, K, c, kPanelColumns, k0 > 0, true, nullptr);
    }
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
        compute_piece<W>(p, m0, m1, panel, k0, nullptr, sums, kIsCode<W> ? wide : nullptr);
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
