// linear in bf16 on AVX-512's dot product of pairs: one instruction takes 16 columns two k further.
//
// A group of up to kGroup rows times one panel (12 x 32) is held in registers while pairs of k go
// by. x is interleaved once per call into the shared workspace, [K/kDepth][groups][pairs][rows of
// the group], so that the inner loop broadcasts pairs from consecutive memory. K is walked in
// pieces of kDepth, whose sums are added in order: so a piece of a panel stays in L1 and a chunk's
// rows of x in L2. One group alone walks several panels at once: weights come from DRAM then, and
// more streams with prefetch read them faster than one.
//
// Rows of W that are not packed are transposed on the way, 16 rows by 16 pairs at a time. Few rows
// of x multiply one such square while the next is made, one group after the other; many find a
// piece made for all of a chunk's groups. Which changes no bit: sums and their order are the same.
// 16 rows a multiple of 4 KB apart (K = 2048, 4096, 6144) meet in one set of L1, which holds 8 or
// 12 lines: their squares end where cache lines do, so that each line is read once (up to 1.7 times
// as fast).
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
// Below either, the weights pass once, in the order of memory; below the first each group makes the
// squares of rows in place for itself.
constexpr int64_t kFewRows = 36;
constexpr int64_t kFewBytes = 640 << 10;  // of x: all of K stays in L2
// Bytes of the panels that are walked that are fetched in advance, into L2: lines on their way to
// L1 hold what its misses need (8 rows, 2 KB ahead into L1: 1.2 times the time).
constexpr int64_t kAhead = 16384;
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
// bytes apart what comes kAhead later, in all of them.
template <int Panels>
struct FetchPanels {
  int64_t step;

  void operator()(const uint32_t* w) {
#pragma GCC unroll 8
    for (int v = 0; v < Panels * kPanelVectors; ++v) {
      __builtin_prefetch(beside(vector_of(w, v, step), kAhead / Panels), 0, 2);
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

inline int64_t group_rows(const LinearParams& p) { return even_rows(p.M, kGroup); }

// Whether the groups meet rows of W in place, one group after the other.
inline bool in_place(const LinearParams& p) { return p.rows && p.M < kFewRows; }

void plan(LinearParams& p, int threads) {
  if (p.M <= kGroup || in_place(p)) {
    const int64_t panels = panel_count(p.N);
    p.row_step = p.M;
    p.row_blocks = 1;
    const int64_t step = panels_at_once(p.M);
    p.panel_step = panels >= 8 * step * threads ? step : 1;
    p.panel_blocks = ceil_div(panels, p.panel_step);
  } else {
    plan_chunks(p, kRowStep, group_rows(p), kPanelStep, threads);
  }
  p.items = ceil_div(p.M, group_rows(p));
  p.workspace_size = p.M * pairs_of(p) * 4;
  const int64_t sums = p.row_step * (p.M <= kGroup ? kMostPanels : p.panel_step) * kPanelColumns;
  p.scratch_size = (sums + kPiece) * 4;
}

// Where the pairs of the group of rows from m on lie, from pair k on, which begins a piece: groups
// take turns in every piece, or follow each other whole where they meet rows in place.
inline uint32_t* rows_at(const LinearParams& p, int64_t m, int64_t k) {
  uint32_t* x = static_cast<uint32_t*>(p.workspace);
  const int64_t all = pairs_of(p);
  if (in_place(p)) return x + m * all + k * least(p.M - m, group_rows(p));
  return x + k * p.M + m * least(kPairs, all - k);
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
struct RowsAhead {
  const bf16* const* rows;
  int64_t k;

  RowsAhead(const bf16* const* w, int64_t now, int64_t all) : rows(w), k(now + kRowsAhead) {
    if (k < all) return;
    rows += kLanes;
    k -= all;
  }
  void fetch(int row) const { __builtin_prefetch(rows[row] + 2 * k, 0, 2); }
};

// acc += a^T * b for pair j of a square.
template <int Rows>
[[gnu::always_inline]] inline void accumulate_pair(const uint32_t* a, const float* square,
                                                   int64_t j, F (&acc)[Rows]) {
  const Pairs b = as_pairs(load(square + j * kLanes));
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) acc[r] = dot_pairs(set_pairs(a[j * Rows + r]), b, acc[r]);
}

// c[Rows][16] = a^T * w for 16 rows of W in place, of `all` pairs. While a square of 16 pairs is
// multiplied the next one is made, a step before the products of each pair: behind all of them,
// which fill the scheduler, it would wait.
template <int Rows>
void multiply_rows(const uint32_t* a, const bf16* const* w, int64_t all, int64_t K, float* c) {
  float squares[2][kLanes * kLanes];
  const auto make = [&](int64_t at, float* to) {
    const RowsAhead ahead(w, at, all);
    fetch_rows(ahead.rows, ahead.k);
    F b[kLanes];
    if (at < 0) {
      load_part(w, at, -at, kLanes, K, b);
    } else {
      load_square(w, at, K, b);
    }
    store_square(b, to, kLanes);
  };
  F acc[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) acc[r] = set(0.0f);
  // At pair k: where a piece ends, its sums are added.
  const auto end_piece = [&](int64_t k) {
    if (k % kPairs != 0 && k != all) return;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      float* to = c + r * kPanelColumns;
      store(to, k > kPairs ? load(to) + acc[r] : acc[r]);
      acc[r] = set(0.0f);
    }
  };
  if (all == 0) return end_piece(0);
  int64_t k = 0, at = -pairs_before(w);
  make(at, squares[0]);
  for (int turn = 0; k < all; at += kLanes, turn ^= 1) {
    const float* square = squares[turn];
    float* next = squares[turn ^ 1];
    const uint32_t* x = a + at * Rows;
    const int64_t then = at + kLanes;
    if (k == at && at / kPairs == (then - 1) / kPairs && K - 2 * then >= 2 * kLanes) {
      const RowsAhead ahead(w, then, all);
      F t[2][kLanes / 2];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        ahead.fetch(j);
        square_step(j, w, then, t, [&](int i, F v) { store(next + i * kLanes, v); });
        accumulate_pair<Rows>(x, square, j, acc);
      }
      k = then;
      end_piece(k);
      continue;
    }
    // The first, the last, and squares in which a piece ends.
    if (then < all) make(then, next);
    const int64_t end = least(then, all);
    while (k < end) {
      const int64_t stop = least(end, (k / kPairs + 1) * kPairs);
      for (; k < stop; ++k) accumulate_pair<Rows>(x, square, k - at, acc);
      end_piece(k);
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
  const int64_t all = pairs_of(p), most = group_rows(p);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t m = g * most, rows = least(p.M - m, most);
    // The places beyond a group's last row are not stored.
    const bf16* x[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      x[r] = static_cast<const bf16*>(p.x) + (m + (r < rows ? r : 0)) * p.x_m;
    }
    for (int64_t k = 0; k < all; k += kLanes) {
      const int64_t piece = k / kPairs * kPairs;
      float* to = reinterpret_cast<float*>(rows_at(p, m, piece) + (k - piece) * rows);
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
      multiply_for(p.M, together)(rows_at(p, 0, k), panel_at<uint32_t>(p, panel, 2 * k),
                                  panel_bytes(p.format, p.K), pairs, sums, stride, k > 0, nullptr);
    }
    for (int64_t i = 0; i < together; ++i) {
      finish(p, sums + i * kPanelColumns, stride, 0, p.M, (panel + i) * kPanelColumns);
    }
  }
}

// The groups meet rows of W in place, which stay in L2 from the first to the last.
void groups_in_place(const LinearParams& p, int64_t panel0, int64_t panel1, float* sums) {
  const int64_t all = pairs_of(p), most = group_rows(p);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    for (int64_t j = 0; j < kPanelColumns; j += kLanes) {
      for (int64_t m = 0; m < p.M; m += most) {
        multiply_rows_for(least(p.M - m, most))(rows_at(p, m, 0), rows_of(p, panel) + j, all, p.K,
                                                sums + m * kPanelColumns + j);
      }
    }
    finish(p, sums, kPanelColumns, 0, p.M, panel * kPanelColumns);
  }
}

// A piece of every panel, then the next piece: so much of the rows of x stays in L2. Few rows stay
// there anyway, and take one panel after the other.
void groups(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1,
            uint32_t* made, float* sums) {
  const int64_t all = pairs_of(p), panels = panel1 - panel0, most = group_rows(p);
  const int64_t pieces = all == 0 ? 1 : ceil_div(all, kPairs);
  const bool few = m1 - m0 < kFewRows || (m1 - m0) * all * 4 < kFewBytes;
  const auto panel_of = [&](int64_t i) { return few ? i / pieces : i % panels; };
  const auto pair_of = [&](int64_t i) { return (few ? i % pieces : i / panels) * kPairs; };
  for (int64_t i = 0; i < pieces * panels; ++i) {
    const int64_t panel = panel_of(i), k = pair_of(i), pairs = least(kPairs, all - k);
    const uint32_t* w = piece_of(p, panel0 + panel, k, pairs, made);
    FetchPiece next{};
    if (p.rows) next = {rows_of(p, panel0 + panel_of(i + 1)), pair_of(i + 1), kPieceLines};
    for (int64_t m = m0; m < m1; m += most) {
      const int64_t rows = least(m1 - m, most);
      float* c = sums + (panel * (m1 - m0) + m - m0) * kPanelColumns;
      multiply_for(rows, 1)(rows_at(p, m, k), w, 0, pairs, c, kPanelColumns, k > 0,
                            p.rows ? &next : nullptr);
      if (k + pairs >= all) finish(p, c, kPanelColumns, m, rows, (panel0 + panel) * kPanelColumns);
    }
  }
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  uint32_t* made = static_cast<uint32_t*>(scratch);
  float* sums = static_cast<float*>(scratch) + kPiece;
  for_chunks(p, begin, end, [&](int64_t m0, int64_t m1, int64_t panel0, int64_t panel1) {
    if (in_place(p)) {
      groups_in_place(p, panel0, panel1, sums);
    } else if (p.M <= kGroup) {
      one_group(p, panel0, panel1, sums);
    } else {
      groups(p, m0, m1, panel0, panel1, made, sums);
    }
  });
}

}  // namespace

namespace IVR_ISA {

void linear_dot(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
