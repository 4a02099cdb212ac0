// linear in bf16 on AVX-512's dot product of pairs: one instruction takes 16 columns two k further.
//
// A group of up to kGroup rows times one panel (12 x 32) is held in registers while pairs of k go
// by. x is interleaved once per call into the shared workspace, [K/kDepth][groups][pairs][rows of
// the group], so that the inner loop broadcasts pairs from consecutive memory. K is walked in
// pieces of kDepth, whose sums are added in order: so a piece of a panel stays in L1 and a chunk's
// rows of x in L2. One group alone walks several panels at once: weights come from DRAM then, and
// more streams with prefetch read them faster than one.
//
// Quantised weights become pairs right before they are used: in a small buffer, a piece of a panel
// for all rows that meet it, or in registers for the fewest rows.
#include "kernels/cpu/linear_codes.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/simd.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

constexpr int64_t kGroup = 12;
constexpr int64_t kPanelVectors = kPanelColumns / kLanes;
// Rows x panels whose sums fit the registers beside the weights and a broadcast.
constexpr int64_t kRegisterPanels = kGroup;
constexpr int64_t kMostPanels = 4;
// Part of the result's definition: the same for every M. 12 rows of x are 6 KB, a piece of a panel
// is 16 KB: both fit L1.
constexpr int64_t kDepth = 256;
constexpr int64_t kPieceWords = kDepth / 2 * kPanelColumns;
constexpr int64_t kRowStep = 360;  // 184 KB of x: a piece of a panel is read from memory once
constexpr int64_t kPanelStep = 8;  // 368 KB of partial sums
constexpr int64_t kFewRows = 36;   // below, the weights pass once, in the order of memory
constexpr int64_t kAhead = 2048;   // bytes of a stream that are fetched in advance

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t pairs_of(const LinearParams& p) { return (p.K + 1) / 2; }

template <int Rows, int Panels>
using Sums = F[Rows][Panels * kPanelVectors];

// acc += a[pairs][Rows]^T * w[pairs][32], for panels `step` bytes apart, of which what comes
// `ahead` bytes later is fetched meanwhile.
template <int Rows, int Panels>
[[gnu::always_inline]] inline void accumulate(const uint32_t* a, const uint32_t* w, int64_t step,
                                              int64_t pairs, int64_t ahead,
                                              Sums<Rows, Panels>& acc) {
  constexpr int kVectors = Panels * kPanelVectors;
  for (int64_t k = 0; k < pairs; ++k, a += Rows, w += kPanelColumns) {
    Pairs b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* at = beside(w, v / kPanelVectors * step) + v % kPanelVectors * kLanes;
      if (ahead > 0) __builtin_prefetch(beside(at, ahead));
      b[v] = load_pairs(at);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Pairs x = set_pairs(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_pairs(x, b[v], acc[r][v]);
    }
  }
}

// The same for quantised panels, whose weights are made in registers. w begins a group.
template <int Rows, int Panels, class Code>
[[gnu::always_inline]] inline void accumulate_codes(const uint32_t* a, const Code* w, int64_t step,
                                                    int64_t pairs, Sums<Rows, Panels>& acc) {
  constexpr int kVectors = Panels * kPanelVectors;
  for (int64_t k = 0; k < pairs; k += kGroupPairs) {
    PairScales by[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Code* group = beside(w, v / kPanelVectors * step);
      by[v] = load_pair_scales<Code>(scales_of(group) + v % kPanelVectors * kLanes);
    }
    const Code* codes = codes_of(w);
    const int64_t n = least(kGroupPairs, pairs - k);
    for (int64_t i = 0; i < n; ++i, a += Rows, codes += kPanelColumns) {
      Pairs b[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Code* at = beside(codes, v / kPanelVectors * step) + v % kPanelVectors * kLanes;
        if (v % kPanelVectors == 0) __builtin_prefetch(beside(at, kCodesAhead));
        b[v] = {load_weights(at, by[v])};
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Pairs x = set_pairs(a[r]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_pairs(x, b[v], acc[r][v]);
      }
    }
    w = beside(w, panel_bytes(Code::kFormat, kQuantGroup));
  }
}

// c[Rows][Panels * 32] (+)= a^T * w.
template <int Rows, int Panels, class W>
void multiply(const uint32_t* a, const W* w, int64_t step, int64_t pairs, float* c, int64_t c_m,
              bool resume) {
  constexpr int kVectors = Panels * kPanelVectors;
  Sums<Rows, Panels> acc;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = set(0.0f);
  }
  if constexpr (kIsCode<W>) {
    accumulate_codes<Rows, Panels>(a, w, step, pairs, acc);
  } else {
    accumulate<Rows, Panels>(a, w, step, pairs, kAhead, acc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * c_m + v * kLanes;
      store(to, resume ? load(to) + acc[r][v] : acc[r][v]);
    }
  }
}

template <class W>
using Multiply = void (*)(const uint32_t*, const W*, int64_t, int64_t, float*, int64_t, bool);

// The panels that a group alone takes at once, and the most rows that codes meet in registers:
// their scales need room there too. More rows find them decoded.
constexpr int64_t kCodePanels = 2;
constexpr int64_t kCodeRows = 3;
template <class W>
int64_t panels_at_once(int64_t rows) {
  if constexpr (kIsCode<W>) {
    return rows <= kCodeRows ? kCodePanels : 1;
  } else {
    return rows * 4 <= kRegisterPanels ? 4 : rows * 2 <= kRegisterPanels ? 2 : 1;
  }
}

template <class W, int Rows = kIsCode<W> ? kCodeRows : kGroup>
Multiply<W> multiply_for(int64_t rows, int64_t panels) {
  if (rows == Rows) {
    if constexpr (kIsCode<W>) {
      return multiply<Rows, kCodePanels, W>;
    } else {
      if constexpr (Rows * 4 <= kRegisterPanels) {
        if (panels == 4) return multiply<Rows, 4, W>;
      }
      if constexpr (Rows * 2 <= kRegisterPanels) {
        if (panels == 2) return multiply<Rows, 2, W>;
      }
      return multiply<Rows, 1, W>;
    }
  }
  if constexpr (Rows > 1) return multiply_for<W, Rows - 1>(rows, panels);
  return nullptr;
}

void plan(LinearParams& p, int threads) {
  const int64_t panels = panel_count(p.N);
  if (p.M <= kGroup) {
    p.row_step = p.M;
    p.row_blocks = 1;
    const int64_t step = panels_at_once<uint32_t>(p.M);
    p.panel_step = panels >= 8 * step * threads ? step : 1;
  } else {
    // Even blocks, whole groups.
    const int64_t blocks = ceil_div(p.M, kRowStep);
    p.row_step = ceil_div(ceil_div(p.M, blocks), kGroup) * kGroup;
    p.row_blocks = ceil_div(p.M, p.row_step);
    p.panel_step = kPanelStep;
    while (p.panel_step > 1 && p.row_blocks * ceil_div(panels, p.panel_step) < 6 * threads) {
      p.panel_step /= 2;
    }
  }
  p.panel_blocks = ceil_div(panels, p.panel_step);
  p.items = ceil_div(p.M, kGroup);
  p.workspace_size = p.M * pairs_of(p) * 4;
  const int64_t sums = p.row_step * (p.M <= kGroup ? kMostPanels : p.panel_step) * kPanelColumns;
  p.scratch_size = (kPieceWords + sums) * 4;
}

// Where the pairs of rows from m on lie, from pair k on: k is a multiple of kDepth / 2, `pairs` the
// length of its piece.
inline uint32_t* rows_at(const LinearParams& p, int64_t m, int64_t k, int64_t pairs) {
  return static_cast<uint32_t*>(p.workspace) + k * p.M + m * pairs;
}

// Pairs [k, k + 16) of up to 16 rows, transposed; zeros beyond K.
inline void load_square(const bf16* x, int64_t x_m, int64_t rows, int64_t k, int64_t K,
                        F (&v)[kLanes]) {
  const int64_t n = least(K - 2 * k, 2 * kLanes);
  const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  for (int r = 0; r < kLanes; ++r) {
    v[r] = set(0.0f);
    if (r < rows) {
      v[r].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, x + r * x_m + 2 * k));
    }
  }
  transpose(v);
}

void prepare(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t all = pairs_of(p);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t m = g * kGroup, rows = least(p.M - m, kGroup);
    const bf16* x = static_cast<const bf16*>(p.x) + m * p.x_m;
    for (int64_t k = 0; k < all; k += kLanes) {
      const int64_t piece = k / (kDepth / 2) * (kDepth / 2);
      const int64_t n = least(kLanes, all - k);
      float* to = reinterpret_cast<float*>(rows_at(p, m, piece, least(kDepth / 2, all - piece)) +
                                           (k - piece) * rows);
      F v[kLanes];
      load_square(x, p.x_m, rows, k, p.K, v);
      for (int64_t i = 0; i < n; ++i) store_n(to + i * rows, v[i], rows);
    }
  }
}

// A piece of a panel as pairs: where it lies, or decoded.
template <class W>
const uint32_t* as_pairs(const W* w, int64_t pairs, uint32_t* made) {
  if constexpr (kIsCode<W>) {
    decode(w, 0, pairs, made);
    return made;
  } else {
    return w;
  }
}

// One group meets its panels; the weights pass once, in the order of memory.
template <class W>
void few_rows(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1,
              float* sums, uint32_t* made) {
  const int64_t all = pairs_of(p), step = panel_bytes(p.format, p.K);
  const int64_t most = m1 - m0 <= kGroup ? panels_at_once<W>(m1 - m0) : 1;
  int64_t together;
  for (int64_t panel = panel0; panel < panel1; panel += together) {
    together = panel1 - panel >= most ? most : 1;
    const int64_t stride = together * kPanelColumns;
    // At least one piece: the epilogue of a product over nothing.
    for (int64_t k = 0; k == 0 || k < all; k += kDepth / 2) {
      const int64_t pairs = least(kDepth / 2, all - k);
      const W* w = panel_at<W>(p, panel, 2 * k);
      if (together > 1) {
        multiply_for<W>(m1 - m0, together)(rows_at(p, m0, k, pairs), w, step, pairs, sums, stride,
                                           k > 0);
        continue;
      }
      const uint32_t* one = as_pairs(w, pairs, made);
      for (int64_t m = m0; m < m1; m += kGroup) {
        const int64_t rows = least(m1 - m, kGroup);
        multiply_for<uint32_t>(rows, 1)(rows_at(p, m, k, pairs), one, 0, pairs,
                                        sums + (m - m0) * stride, stride, k > 0);
      }
    }
    for (int64_t i = 0; i < together; ++i) {
      finish(p, sums + i * kPanelColumns, stride, m0, m1 - m0, (panel + i) * kPanelColumns);
    }
  }
}

// A piece of every panel, then the next piece.
template <class W>
void many_rows(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1,
               float* sums, uint32_t* made) {
  const int64_t all = pairs_of(p);
  for (int64_t k = 0; k == 0 || k < all; k += kDepth / 2) {
    const int64_t pairs = least(kDepth / 2, all - k);
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      const uint32_t* w = as_pairs(panel_at<W>(p, panel, 2 * k), pairs, made);
      float* to = sums + (panel - panel0) * (m1 - m0) * kPanelColumns;
      for (int64_t m = m0; m < m1; m += kGroup) {
        const int64_t rows = least(m1 - m, kGroup);
        float* c = to + (m - m0) * kPanelColumns;
        multiply_for<uint32_t>(rows, 1)(rows_at(p, m, k, pairs), w, 0, pairs, c, kPanelColumns,
                                        k > 0);
        if (k + pairs >= all) finish(p, c, kPanelColumns, m, rows, panel * kPanelColumns);
      }
    }
  }
}

template <class W>
void run(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t panels = panel_count(p.N);
  uint32_t* made = static_cast<uint32_t*>(scratch);
  float* sums = static_cast<float*>(scratch) + kPieceWords;
  for (int64_t i = begin; i < end; ++i) {
    // Rows go first, so that neighbours in time share weights.
    const int64_t m = i % p.row_blocks * p.row_step, m1 = least(m + p.row_step, p.M);
    const int64_t panel = i / p.row_blocks * p.panel_step;
    const auto rows = m1 - m < kFewRows ? few_rows<W> : many_rows<W>;
    rows(p, m, m1, panel, least(panel + p.panel_step, panels), sums, made);
  }
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.format) {
    case WeightFormat::int8:
      return run<Int8Pair>(p, begin, end, scratch);
    case WeightFormat::int4:
      return run<Int4Pair>(p, begin, end, scratch);
    default:
      return run<uint32_t>(p, begin, end, scratch);
  }
}

}  // namespace

namespace IVR_ISA {

void linear_dot(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
