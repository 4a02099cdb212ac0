// linear in bf16 on AVX-512's dot product of pairs: one instruction takes 16 columns two k further.
//
// A group of up to kGroup rows times one panel (12 x 32) is held in registers while pairs of k go
// by. x is interleaved once per call into the shared workspace, [K/kDepth][groups][pairs][rows of
// the group], so that the inner loop broadcasts pairs from consecutive memory. K is walked in
// pieces of kDepth, whose sums are added in order: so a piece of a panel stays in L1 and a chunk's
// rows of x in L2. One group alone walks several panels at once: weights come from DRAM then, and
// more streams with prefetch read them faster than one.
//
// Rows of W that are not packed are transposed on the way, 16 rows by 16 pairs at a time: in the
// registers of a group alone, else a piece at a time for all of a chunk's groups. Which changes no
// bit: sums and their order are the same. 16 rows a multiple of 4 KB apart (K = 2048, 4096, 6144)
// meet in one set of L1, which holds 8 or 12 lines: their squares end where cache lines do, so that
// each line is read once (up to 1.7 times as fast).
#include "kernels/cpu/linear_chunks.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/linear_rows.h"
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
constexpr int64_t kPairs = kDepth / 2;
constexpr int64_t kPiece = kPairs * kPanelColumns;  // words of a piece of a panel
constexpr int64_t kPieceLines =
    (kPairs / kLanes + 1) * kPanelColumns;  // of cache, of rows in place
constexpr int64_t kRowStep = 360;  // 184 KB of x: a piece of a panel is read from memory once
constexpr int64_t kPanelStep = 8;  // 368 KB of partial sums
// Below either, the weights pass once, in the order of memory.
constexpr int64_t kFewRows = 36;
constexpr int64_t kFewBytes = 640 << 10;  // of x: all of K stays in L2
constexpr int64_t kAhead = 2048;          // bytes of a stream that are fetched in advance
// Pairs of each of 16 rows in place, which are fetched into L2: rows of 1792 bytes share few sets
// of L1 (12 against 25 GB/s). Not of the next panel: another thread may take that one.
constexpr int64_t kRowsAhead = 256;

// K in pairs, padded with zeros as packed weights are.
inline int64_t pairs_of(const LinearParams& p) {
  return ceil_div(p.K, kTileDepth) * (kTileDepth / 2);
}

// Vector v of panels that lie `step` bytes apart.
inline const uint32_t* vector_of(const uint32_t* w, int v, int64_t step) {
  return beside(w, v / kPanelVectors * step) + v % kPanelVectors * kLanes;
}

template <int Rows, int Panels>
using Sums = F[Rows][Panels * kPanelVectors];

// What a product fetches from memory meanwhile, once for every pair: of panels that lie `step`
// bytes apart what comes kAhead later.
template <int Panels>
struct FetchPanels {
  int64_t step;

  void operator()(const uint32_t* w) {
#pragma GCC unroll 8
    for (int v = 0; v < Panels * kPanelVectors; ++v) {
      __builtin_prefetch(beside(vector_of(w, v, step), kAhead));
    }
  }
};

// Of rows in place those of another piece, a line at a time.
struct FetchPiece {
  const bf16* const* rows;
  int64_t k;     // the first pair
  int64_t left;  // lines

  void operator()(const uint32_t*) {
    if (left <= 0) return;
    --left;
    const int64_t at = k + left / kPanelColumns * kLanes;
    __builtin_prefetch(rows[left % kPanelColumns] + 2 * at, 0, 2);
  }
};

// acc += a[pairs][Rows]^T * w[pairs][32], for panels `step` bytes apart.
template <int Rows, int Panels, class Fetch>
[[gnu::always_inline]] inline void accumulate(const uint32_t* a, const uint32_t* w, int64_t step,
                                              int64_t pairs, Fetch& fetch,
                                              Sums<Rows, Panels>& acc) {
  constexpr int kVectors = Panels * kPanelVectors;
  for (int64_t k = 0; k < pairs; ++k, a += Rows, w += kPanelColumns) {
    fetch(w);
    Pairs b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = load_pairs(vector_of(w, v, step));
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Pairs x = set_pairs(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_pairs(x, b[v], acc[r][v]);
    }
  }
}

// c[Rows][Panels * 32] (+)= a^T * w.
template <int Rows, int Panels>
void multiply(const uint32_t* a, const uint32_t* w, int64_t step, int64_t pairs, float* c,
              int64_t c_m, bool resume, FetchPiece* rows) {
  constexpr int kVectors = Panels * kPanelVectors;
  Sums<Rows, Panels> acc;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = set(0.0f);
  }
  if (rows) {
    accumulate<Rows, Panels>(a, w, step, pairs, *rows, acc);
  } else {
    FetchPanels<Panels> panels{step};
    accumulate<Rows, Panels>(a, w, step, pairs, panels, acc);
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

using Multiply = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t, bool,
                          FetchPiece*);

// The panels that a group alone takes at once.
int64_t panels_at_once(int64_t rows) {
  return rows * 4 <= kRegisterPanels ? 4 : rows * 2 <= kRegisterPanels ? 2 : 1;
}

template <int Rows = kGroup>
Multiply multiply_for(int64_t rows, int64_t panels) {
  if (rows == Rows) {
    if constexpr (Rows * 4 <= kRegisterPanels) {
      if (panels == 4) return multiply<Rows, 4>;
    }
    if constexpr (Rows * 2 <= kRegisterPanels) {
      if (panels == 2) return multiply<Rows, 2>;
    }
    return multiply<Rows, 1>;
  }
  if constexpr (Rows > 1) return multiply_for<Rows - 1>(rows, panels);
  return nullptr;
}

void plan(LinearParams& p, int threads) {
  if (p.M <= kGroup) {
    const int64_t panels = panel_count(p.N);
    p.row_step = p.M;
    p.row_blocks = 1;
    const int64_t step = panels_at_once(p.M);
    p.panel_step = panels >= 8 * step * threads ? step : 1;
    p.panel_blocks = ceil_div(panels, p.panel_step);
  } else {
    plan_chunks(p, kRowStep, kGroup, kPanelStep, threads);
  }
  p.items = ceil_div(p.M, kGroup);
  p.workspace_size = p.M * pairs_of(p) * 4;
  const int64_t sums = p.row_step * (p.M <= kGroup ? kMostPanels : p.panel_step) * kPanelColumns;
  p.scratch_size = (sums + kPiece) * 4;
}

// Where the pairs of rows from m on lie, from pair k on: k is a multiple of kPairs, `pairs` the
// length of its piece.
inline uint32_t* rows_at(const LinearParams& p, int64_t m, int64_t k, int64_t pairs) {
  return static_cast<uint32_t*>(p.workspace) + k * p.M + m * pairs;
}

inline void store_square(const F (&v)[kLanes], float* to, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * stride, v[i]);
}

// Pair k of 16 rows.
inline void fetch_rows(const bf16* const* rows, int64_t k) {
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) __builtin_prefetch(rows[r] + 2 * k, 0, 2);
}
// What comes kRowsAhead pairs after pair k of `all`: in these rows, or in those that follow.
inline void fetch_ahead(const bf16* const* rows, int64_t k, int64_t all) {
  const int64_t at = k + kRowsAhead;
  fetch_rows(at < all ? rows : rows + kLanes, at < all ? at : at - all);
}

// acc += a^T * b for pairs [from, to) of a square.
template <int Rows>
inline void accumulate_some(const uint32_t* a, const float* square, int64_t from, int64_t to,
                            F (&acc)[Rows]) {
  for (int64_t j = from; j < to; ++j, a += Rows) {
    const Pairs b = as_pairs(load(square + j * kLanes));
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) acc[r] = dot_pairs(set_pairs(a[r]), b, acc[r]);
  }
}

// c[Rows][16] = a^T * w for 16 rows of W in place, of `all` pairs.
template <int Rows>
void multiply_rows(const uint32_t* a, const bf16* const* w, int64_t all, int64_t K, float* c) {
  const int64_t before = pairs_before(w);
  float square[kLanes * kLanes];  // in which a piece ends and the next begins
  F b[kLanes];
  if (before > 0) {
    load_part(w, -before, before, kLanes, K, b);
    store_square(b, square, kLanes);
  }
  for (int64_t begin = 0; begin == 0 || begin < all; begin += kPairs) {
    const int64_t end = least(begin + kPairs, all);
    F acc[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) acc[r] = set(0.0f);
    int64_t k = begin;
    if (before > 0) {
      k = least(begin + kLanes - before, end);
      accumulate_some<Rows>(a + begin * Rows, square, before, before + k - begin, acc);
    }
    for (; k + kLanes <= end; k += kLanes) {
      fetch_ahead(w, k, all);
      load_square(w, k, K, b);
      const uint32_t* x = a + k * Rows;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          acc[r] = dot_pairs(set_pairs(x[j * Rows + r]), as_pairs(b[j]), acc[r]);
        }
      }
    }
    if (k < end) {
      fetch_ahead(w, k, all);
      load_square(w, k, K, b);
      store_square(b, square, kLanes);
      accumulate_some<Rows>(a + k * Rows, square, 0, end - k, acc);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      float* to = c + r * kPanelColumns;
      store(to, begin > 0 ? load(to) + acc[r] : acc[r]);
    }
  }
}

using MultiplyRows = void (*)(const uint32_t*, const bf16* const*, int64_t, int64_t, float*);

template <int Rows = kGroup>
MultiplyRows multiply_rows_for(int64_t rows) {
  if (rows == Rows) return multiply_rows<Rows>;
  if constexpr (Rows > 1) return multiply_rows_for<Rows - 1>(rows);
  return nullptr;
}

// Pairs [from, to) of the square from pair k on, for 16 rows of W, while those of the next panel
// are fetched.
inline void make_columns(const bf16* const* rows, int64_t k, int64_t from, int64_t to, int64_t K,
                         float* made) {
  fetch_rows(rows + kPanelColumns, k);
  F v[kLanes];
  if (from == 0 && to == kLanes) {
    load_square(rows, k, K, v);
    store_square(v, made, kPanelColumns);
  } else {
    load_part(rows, k, from, to, K, v);
    for (int64_t i = from; i < to; ++i) store(made + i * kPanelColumns, v[i]);
  }
}

// A piece of a panel from pair k on: where it lies, or made from rows.
const uint32_t* piece_of(const LinearParams& p, int64_t panel, int64_t k, int64_t pairs,
                         uint32_t* made) {
  if (!p.rows) return panel_at<uint32_t>(p, panel, 2 * k);
  const bf16* const* rows = rows_of(p, panel);
  float* to = reinterpret_cast<float*>(made);
  for (int64_t i = -pairs_before(rows); i < pairs; i += kLanes) {
    const int64_t begin = i < 0 ? -i : 0, end = least(kLanes, pairs - i);
    for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
      make_columns(rows + j, k + i, begin, end, p.K, to + i * kPanelColumns + j);
    }
  }
  return made;
}

void prepare(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t all = pairs_of(p);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t m = g * kGroup, rows = least(p.M - m, kGroup);
    // The places beyond a group's last row are not stored.
    const bf16* x[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      x[r] = static_cast<const bf16*>(p.x) + (m + (r < rows ? r : 0)) * p.x_m;
    }
    for (int64_t k = 0; k < all; k += kLanes) {
      const int64_t piece = k / kPairs * kPairs;
      float* to = reinterpret_cast<float*>(rows_at(p, m, piece, least(kPairs, all - piece)) +
                                           (k - piece) * rows);
      F v[kLanes];
      load_square(x, k, p.K, v);
      for (int64_t i = 0; i < kLanes; ++i) store_n(to + i * rows, v[i], rows);
    }
  }
}

// One group meets its panels.
void one_group(const LinearParams& p, int64_t panel0, int64_t panel1, float* sums) {
  const int64_t all = pairs_of(p), most = panels_at_once(p.M);
  int64_t together;
  for (int64_t panel = panel0; panel < panel1; panel += together) {
    together = panel1 - panel >= most ? most : 1;
    const int64_t stride = together * kPanelColumns;
    // At least one piece: the epilogue of a product over nothing.
    for (int64_t k = 0; k == 0 || k < all; k += kPairs) {
      const int64_t pairs = least(kPairs, all - k);
      multiply_for(p.M, together)(rows_at(p, 0, k, pairs), panel_at<uint32_t>(p, panel, 2 * k),
                                  panel_bytes(p.format, p.K), pairs, sums, stride, k > 0, nullptr);
    }
    for (int64_t i = 0; i < together; ++i) {
      finish(p, sums + i * kPanelColumns, stride, 0, p.M, (panel + i) * kPanelColumns);
    }
  }
}

// The same with rows of W in place.
void one_group_in_place(const LinearParams& p, int64_t panel0, int64_t panel1, float* sums) {
  const int64_t all = pairs_of(p);
  const MultiplyRows run = multiply_rows_for(p.M);
  const uint32_t* x = rows_at(p, 0, 0, all);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
      run(x, rows_of(p, panel) + j, all, p.K, sums + j);
    }
    finish(p, sums, kPanelColumns, 0, p.M, panel * kPanelColumns);
  }
}

// A piece of every panel, then the next piece: so much of the rows of x stays in L2. Few rows stay
// there anyway, and take one panel after the other.
void groups(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1,
            uint32_t* made, float* sums) {
  const int64_t all = pairs_of(p), panels = panel1 - panel0;
  const int64_t pieces = all == 0 ? 1 : ceil_div(all, kPairs);
  const bool few = m1 - m0 < kFewRows || (m1 - m0) * all * 4 < kFewBytes;
  const auto panel_of = [&](int64_t i) { return few ? i / pieces : i % panels; };
  const auto pair_of = [&](int64_t i) { return (few ? i % pieces : i / panels) * kPairs; };
  for (int64_t i = 0; i < pieces * panels; ++i) {
    const int64_t panel = panel_of(i), k = pair_of(i), pairs = least(kPairs, all - k);
    const uint32_t* w = piece_of(p, panel0 + panel, k, pairs, made);
    FetchPiece next{};
    if (p.rows) next = {rows_of(p, panel0 + panel_of(i + 1)), pair_of(i + 1), kPieceLines};
    for (int64_t m = m0; m < m1; m += kGroup) {
      const int64_t rows = least(m1 - m, kGroup);
      float* c = sums + (panel * (m1 - m0) + m - m0) * kPanelColumns;
      multiply_for(rows, 1)(rows_at(p, m, k, pairs), w, 0, pairs, c, kPanelColumns, k > 0,
                            p.rows ? &next : nullptr);
      if (k + pairs >= all) finish(p, c, kPanelColumns, m, rows, (panel0 + panel) * kPanelColumns);
    }
  }
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  uint32_t* made = static_cast<uint32_t*>(scratch);
  float* sums = static_cast<float*>(scratch) + kPiece;
  for_chunks(p, begin, end, [&](int64_t m0, int64_t m1, int64_t panel0, int64_t panel1) {
    if (p.M > kGroup) {
      groups(p, m0, m1, panel0, panel1, made, sums);
    } else if (p.rows) {
      one_group_in_place(p, panel0, panel1, sums);
    } else {
      one_group(p, panel0, panel1, sums);
    }
  });
}

}  // namespace

namespace IVR_ISA {

void linear_dot(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
