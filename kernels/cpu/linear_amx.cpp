// linear on bf16 matrix tiles: two tiles of rows by one panel (32 x 32) in four tiles of sums.
//
// A chunk's rows of x stay in L2 (kRowBytes) for all its panels; a piece of a panel stays in L1 for
// all its rows. Sums wait in fp32 between pieces, which changes no bit: a step of 32 k adds its own
// sum to what there is. x is read where it is; only an incomplete tile (K % 32, M % 16) is copied
// and padded with zeros. Up to 16 rows, one tile of rows meets two panels: two streams from memory.
//
// Packed weights are tiles where they lie. Quantised ones and rows of W in place become tiles in a
// small buffer: where many rows meet them, the next piece is made between the tile products of this
// one, which leave the vector units idle; so is the epilogue of the panel before. Up to 16 rows of
// x change sides: rows of W are tiles as they are when they come first, x the second operand and
// the product transposed. Factors and their order in a sum are the same, and so are the bits.
#include "kernels/cpu/amx.h"
#include "kernels/cpu/linear_codes.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/linear_rows.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPanelStepBytes = 2 * kTileBytes;  // of a panel, per 32 k
// Tile steps of a piece, 16 KB of a panel. Between two uses of its lines pass 16 KB of x and the
// other lines of the piece: together less than L1's 48 KB.
constexpr int64_t kSteps = 8;
constexpr int64_t kPieceBytes = kSteps * kPanelStepBytes;
constexpr int64_t kRowBytes = 1 << 20;
constexpr int64_t kMaxRows = 512;
constexpr int64_t kStreamAhead = 4096;  // bytes of each stream
constexpr int64_t kStepsAhead = 16;     // of each row of W in place, where many rows of x meet it

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t steps_of(const LinearParams& p) { return ceil_div(p.K, kTileDepth); }

// The first of the row tiles that are copied; those before it are read from x.
inline int64_t first_copied(const LinearParams& p) {
  return p.K % kTileDepth == 0 ? p.M / kTileRows : 0;
}

// Whether x is the second operand: [K/32][16 pairs][16 rows][2] in the workspace.
inline bool takes_second(const LinearParams& p) { return p.rows && p.M <= kTileRows; }

// Of the scratch memory, for what becomes of a weight: two pieces, or one tile of rows.
inline int64_t made_bytes(const LinearParams& p) {
  const int64_t tile = takes_second(p) ? steps_of(p) * kTileBytes : 0;
  return tile < 2 * kPieceBytes ? 2 * kPieceBytes : tile;
}

// Pairs of step s of 16 rows, transposed, to rows of `stride` bytes.
inline void put_square(const bf16* const* rows, int64_t s, int64_t K, char* to, int64_t stride) {
  F v[kLanes];
  load_square(rows, s * (kTileDepth / 2), K, v);
  for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + i * stride), v[i]);
}

struct RowTile {
  const char* base;
  int64_t stride;  // bytes from row to row
  int64_t step;    // bytes from one step of 32 k to the next
};

inline RowTile row_tile(const LinearParams& p, int64_t tile) {
  const int64_t copied = tile - first_copied(p);
  if (copied < 0) {
    return {static_cast<const char*>(p.x) + tile * kTileRows * p.x_m * 2, p.x_m * 2,
            kTileDepth * 2};
  }
  return {static_cast<const char*>(p.workspace) + copied * steps_of(p) * kTileBytes, 64,
          kTileBytes};
}

void plan(LinearParams& p, int threads) {
  const int64_t panels = panel_count(p.N), tiles = ceil_div(p.M, kTileRows);
  if (p.M <= kTileRows) {
    p.row_step = kTileRows;
    p.panel_step = panels >= 32 * threads ? 4 : 2;
  } else {
    int64_t rows = kRowBytes / (steps_of(p) * kTileDepth * 2 + 1) / 32 * 32;
    rows = rows < 64 ? 64 : least(rows, kMaxRows);
    p.row_step = ceil_div(ceil_div(p.M, ceil_div(p.M, rows)), 32) * 32;
    p.panel_step = 16;
  }
  p.row_blocks = ceil_div(p.M, p.row_step);
  while (p.panel_step > 1 && p.row_blocks * ceil_div(panels, p.panel_step) < 6 * threads) {
    p.panel_step /= 2;
  }
  p.panel_blocks = ceil_div(panels, p.panel_step);
  const bool as_second = takes_second(p);
  p.items = as_second ? steps_of(p) : tiles - first_copied(p);
  p.workspace_size = p.items * (as_second ? 1 : steps_of(p)) * kTileBytes;
  // Two panels of sums.
  p.scratch_size = made_bytes(p) + 2 * p.row_step * kPanelColumns * 4;
}

// The rows of an incomplete tile, null for those beyond the last, to [K/32][16][32], zero-padded.
void copy_tile(const bf16* const* rows, int64_t K, char* to) {
  for (int64_t k = 0; k < K; k += kTileDepth, to += kTileBytes) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t n = rows[r] ? least(kTileDepth, K - k) : 0;
      if (n > 0) memcpy(to + r * 64, rows[r] + k, static_cast<size_t>(n) * 2);
      if (n < kTileDepth) memset(to + r * 64 + n * 2, 0, static_cast<size_t>(kTileDepth - n) * 2);
    }
  }
}

// The rows [m, m + 16) of x.
void rows_of_x(const LinearParams& p, int64_t m, const bf16* (&rows)[kTileRows]) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    rows[r] = m + r < p.M ? static_cast<const bf16*>(p.x) + (m + r) * p.x_m : nullptr;
  }
}

void prepare(const LinearParams& p, int64_t begin, int64_t end) {
  const bf16* rows[kTileRows];
  char* to = static_cast<char*>(p.workspace);
  if (takes_second(p)) {
    rows_of_x(p, 0, rows);
    // What stands in the places of rows beyond the last is not stored.
    for (const bf16*& row : rows) row = row ? row : rows[0];
    for (int64_t s = begin; s < end; ++s) put_square(rows, s, p.K, to + s * kTileBytes, 64);
    return;
  }
  for (int64_t item = begin; item < end; ++item) {
    rows_of_x(p, (first_copied(p) + item) * kTileRows, rows);
    copy_tile(rows, p.K, to + item * steps_of(p) * kTileBytes);
  }
}

// A weight that is not packed: LinearParams::rows.
struct Rows {};
template <class W>
constexpr bool kIsMade = kIsCode<W> || __is_same(W, Rows);

// What is kStepsAhead steps further in 16 rows of W, or in those that follow, is fetched into L2.
inline void fetch_rows(const LinearParams& p, const bf16* const* rows, const bf16* const* next,
                       int64_t s) {
  const int64_t ahead = s + kStepsAhead, all = steps_of(p);
  const int64_t k = (ahead < all ? ahead : ahead - all) * kTileDepth;
  if (ahead < all) next = rows;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) __builtin_prefetch(next[r] + k, 0, 2);
}

// Step s of a panel: 32 k of its columns as pairs of bf16, [16][32][2].
template <class W>
void make_step(const LinearParams& p, int64_t panel, int64_t s, char* to) {
  if constexpr (kIsCode<W>) {
    constexpr int64_t kPairs = kTileDepth / 2;
    decode(panel_at<W>(p, panel, 0), s * kPairs, kPairs, reinterpret_cast<uint32_t*>(to));
  } else {
    const bf16* const* rows = rows_of(p, panel);
    for (int64_t j = 0; j < kPanelColumns; j += kTileRows) {
      fetch_rows(p, rows + j, rows + j + kPanelColumns, s);
      put_square(rows + j, s, p.K, to + j * 4, kPanelColumns * 4);
    }
  }
}

// What is done between the tile products of a block, a share at each of its steps.
struct Nothing {
  void operator()() {}
};

// What follows in memory is fetched into L2.
struct Fetch {
  const char* at;
  int64_t bytes;

  void operator()() {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b, 0, 2);
    at += bytes;
  }
};

// Work of so many parts, spread evenly over so many calls.
struct Spread {
  int64_t parts, calls;
  int64_t call = 0, done = 0;

  template <class Part>
  void operator()(Part&& part) {
    for (++call; done * calls < parts * call; ++done) part(done);
  }
};

// 32 rows by one panel. c: [32][32].
template <class Share>
void block_2x2(Tiles& t, RowTile a0, RowTile a1, const char* w, int64_t steps, float* c,
               bool resume, Share& share) {
  constexpr int64_t kRow = kPanelColumns * 4;
  float* c1 = c + kTileRows * kPanelColumns;
  if (resume) {
    t.load<0>(c, kRow);
    t.load<1>(c + 16, kRow);
    t.load<2>(c1, kRow);
    t.load<3>(c1 + 16, kRow);
  } else {
    t.zero<0>();
    t.zero<1>();
    t.zero<2>();
    t.zero<3>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    t.load<4>(a0.base + s * a0.step, a0.stride);
    t.load<6>(w + s * kPanelStepBytes, 128);
    t.load<7>(w + s * kPanelStepBytes + 64, 128);
    t.multiply<0, 4, 6>();
    t.load<5>(a1.base + s * a1.step, a1.stride);
    t.multiply<1, 4, 7>();
    share();
    t.multiply<2, 5, 6>();
    t.multiply<3, 5, 7>();
  }
  t.store<0>(c, kRow);
  t.store<1>(c + 16, kRow);
  t.store<2>(c1, kRow);
  t.store<3>(c1 + 16, kRow);
}

// 16 rows by one panel. c: [16][32].
template <class Share>
void block_1x2(Tiles& t, RowTile a, const char* w, int64_t steps, float* c, bool resume,
               Share& share) {
  constexpr int64_t kRow = kPanelColumns * 4;
  if (resume) {
    t.load<0>(c, kRow);
    t.load<1>(c + 16, kRow);
  } else {
    t.zero<0>();
    t.zero<1>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    t.load<4>(a.base + s * a.step, a.stride);
    t.load<6>(w + s * kPanelStepBytes, 128);
    t.load<7>(w + s * kPanelStepBytes + 64, 128);
    t.multiply<0, 4, 6>();
    share();
    t.multiply<1, 4, 7>();
  }
  t.store<0>(c, kRow);
  t.store<1>(c + 16, kRow);
}

// 16 rows by two panels. c: [16][64].
template <class Share>
void block_1x4(Tiles& t, RowTile a, const char* w0, const char* w1, int64_t steps, float* c,
               bool resume, Share share0, Share share1) {
  constexpr int64_t kRow = 2 * kPanelColumns * 4;
  if (resume) {
    t.load<0>(c, kRow);
    t.load<1>(c + 16, kRow);
    t.load<2>(c + 32, kRow);
    t.load<3>(c + 48, kRow);
  } else {
    t.zero<0>();
    t.zero<1>();
    t.zero<2>();
    t.zero<3>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    t.load<4>(a.base + s * a.step, a.stride);
    t.load<5>(w0 + s * kPanelStepBytes, 128);
    t.load<6>(w0 + s * kPanelStepBytes + 64, 128);
    t.multiply<0, 4, 5>();
    share0();
    t.multiply<1, 4, 6>();
    t.load<7>(w1 + s * kPanelStepBytes, 128);
    t.load<5>(w1 + s * kPanelStepBytes + 64, 128);
    t.multiply<2, 4, 7>();
    share1();
    t.multiply<3, 4, 5>();
  }
  t.store<0>(c, kRow);
  t.store<1>(c + 16, kRow);
  t.store<2>(c + 32, kRow);
  t.store<3>(c + 48, kRow);
}

// Two panels, of `all` steps, at once. Packed ones pass in the order of memory.
void two_packed(Tiles& t, const LinearParams& p, int64_t panel, bool both, float* sums) {
  const auto at = [&](int64_t i) {
    return reinterpret_cast<const char*>(panel_at<bf16>(p, panel + i, 0));
  };
  const auto fetch = [&](int64_t i) { return Fetch{at(i) + kStreamAhead, kPanelStepBytes}; };
  const RowTile a = row_tile(p, 0);
  const int64_t steps = steps_of(p);
  if (both) return block_1x4(t, a, at(0), at(1), steps, sums, false, fetch(0), fetch(1));
  Fetch share = fetch(0);
  block_1x2(t, a, at(0), steps, sums, false, share);
}

// Others a piece after the other.
template <class W>
void two_made(Tiles& t, const LinearParams& p, int64_t panel, bool both, float* sums, char* made) {
  const int64_t all = steps_of(p);
  for (int64_t s = 0; s == 0 || s < all; s += kSteps) {
    const int64_t steps = least(kSteps, all - s);
    for (int64_t i = 0; i <= both; ++i) {
      for (int64_t j = 0; j < steps; ++j) {
        make_step<W>(p, panel + i, s + j, made + i * kPieceBytes + j * kPanelStepBytes);
      }
    }
    RowTile a = row_tile(p, 0);
    a.base += s * a.step;
    Nothing nothing;
    if (both) {
      block_1x4(t, a, made, made + kPieceBytes, steps, sums, s > 0, nothing, nothing);
    } else {
      block_1x2(t, a, made, steps, sums, s > 0, nothing);
    }
  }
}

// 16 rows of W as tiles: where they lie, or copied if a tile is not whole or they lie unevenly.
RowTile weight_tile(const LinearParams& p, const bf16* const* rows, char* made) {
  const auto at = [rows](int r) { return reinterpret_cast<const char*>(rows[r]); };
  const int64_t stride = at(1) - at(0);
  bool even = p.K % kTileDepth == 0;
  for (int r = 2; r < kTileRows; ++r) even = even && at(r) - at(r - 1) == stride;
  if (even) return {at(0), stride, kTileDepth * 2};
  copy_tile(rows, p.K, made);
  return {made, 64, kTileBytes};
}

// 16 rows are read column by column, kTileDepth k at a step, and memory would rather be read in
// order: while a block of 16 rows (32 KB) is, the block that follows is fetched into L2 row by row,
// the same rows further on or the 16 rows behind them.
class FetchRows {
 public:
  // Before the first of `steps` steps.
  FetchRows(const bf16* const* rows, int64_t steps) : next_(rows), steps_(steps) {}

  // At each step.
  void operator()() {
    if (left_ == 0) begin_block();
    --left_;
    for (int64_t i = 0; i < share_ && row_ < kTileRows; ++i) {
      __builtin_prefetch(next_[row_] + (begin_ + at_) * kTileDepth, 0, 2);
      if (++at_ < length_) continue;
      at_ = 0;
      ++row_;
    }
  }

 private:
  static constexpr int64_t kMost = 32;

  int64_t length_from(int64_t begin) const { return least(kMost, steps_ - begin); }
  void begin_block() {
    left_ = length_from(begin_);
    begin_ += left_;
    if (begin_ == steps_) {
      begin_ = 0;
      next_ += kTileRows;
    }
    length_ = length_from(begin_);
    share_ = ceil_div(length_ * kTileRows, left_);
    row_ = at_ = 0;
  }

  // The block that is fetched, and where in it; the steps that are left of the one that is read.
  const bf16* const* next_;
  int64_t steps_, begin_ = 0, length_ = 0, row_ = 0, at_ = 0;
  int64_t left_ = 0, share_ = 0;
};

// Rows of W in place, 16 at a time.
void few_rows_in_place(Tiles& t, const LinearParams& p, int64_t panel0, int64_t panel1, float* sums,
                       char* made) {
  const int64_t all = steps_of(p);
  const char* x = static_cast<const char*>(p.workspace);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    for (int64_t j = 0; j < kPanelColumns; j += kTileRows) {
      const bf16* const* rows = rows_of(p, panel) + j;
      const RowTile w = weight_tile(p, rows, made);
      FetchRows fetch(rows, all);
      t.zero<0>();
      for (int64_t s = 0; s < all; ++s) {
        fetch();
        t.load<1>(w.base + s * w.step, w.stride);
        t.load<2>(x + s * kTileBytes, 64);
        t.multiply<0, 1, 2>();
      }
      alignas(64) float product[kTileRows][kTileRows];
      t.store<0>(product, 64);
      F v[kLanes];
      for (int n = 0; n < kLanes; ++n) v[n] = load(product[n]);
      transpose(v);
      for (int m = 0; m < kLanes; ++m) store(sums + m * kPanelColumns + j, v[m]);
    }
    finish(p, sums, kPanelColumns, 0, p.M, panel * kPanelColumns);
  }
}

template <class W>
void few_rows(Tiles& t, const LinearParams& p, int64_t panel0, int64_t panel1, float* sums,
              char* made) {
  if constexpr (__is_same(W, Rows)) return few_rows_in_place(t, p, panel0, panel1, sums, made);
  for (int64_t panel = panel0; panel < panel1; panel += 2) {
    const bool both = panel + 1 < panel1;
    if constexpr (kIsMade<W>) {
      two_made<W>(t, p, panel, both, sums, made);
    } else {
      two_packed(t, p, panel, both, sums);
    }
    const int64_t stride = both ? 2 * kPanelColumns : kPanelColumns;
    finish(p, sums, stride, 0, p.M, panel * kPanelColumns);
    if (both) finish(p, sums + kPanelColumns, stride, 0, p.M, (panel + 1) * kPanelColumns);
  }
}

// Steps [s, s + steps) of a panel, w, meet the rows [m0, m1).
template <class Share>
void piece_of_rows(Tiles& t, const LinearParams& p, int64_t m0, int64_t m1, int64_t s,
                   int64_t steps, const char* w, float* sums, Share& share) {
  for (int64_t m = m0; m < m1; m += 2 * kTileRows) {
    float* c = sums + (m - m0) * kPanelColumns;
    RowTile a0 = row_tile(p, m / kTileRows);
    a0.base += s * a0.step;
    if (m + kTileRows < m1) {
      RowTile a1 = row_tile(p, m / kTileRows + 1);
      a1.base += s * a1.step;
      block_2x2(t, a0, a1, w, steps, c, s > 0, share);
    } else {
      block_1x2(t, a0, w, steps, c, s > 0, share);
    }
  }
}

template <class W>
void many_rows(Tiles& t, const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0,
               int64_t panel1, float* sums, char* made) {
  constexpr int64_t kPart = 4;  // rows of an epilogue
  const int64_t all = steps_of(p), blocks = ceil_div(m1 - m0, 2 * kTileRows);
  const auto sums_of = [&](int64_t panel) {
    return sums + (panel - panel0) % 2 * p.row_step * kPanelColumns;
  };
  const auto finish_rows = [&](int64_t panel, int64_t m, int64_t rows) {
    finish(p, sums_of(panel) + (m - m0) * kPanelColumns, kPanelColumns, m, least(rows, m1 - m),
           panel * kPanelColumns);
  };
  // Pieces are made alternately in two places.
  const auto place = [&](int64_t panel, int64_t s) {
    return made + ((panel - panel0) * ceil_div(all, kSteps) + s / kSteps) % 2 * kPieceBytes;
  };
  const auto make = [&](int64_t panel, int64_t s, int64_t i) {
    make_step<W>(p, panel, s + i, place(panel, s) + i * kPanelStepBytes);
  };
  if constexpr (kIsMade<W>) {
    for (int64_t i = 0; i < least(kSteps, all); ++i) make(panel0, 0, i);
  }
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    Spread epilogue{panel > panel0 ? ceil_div(m1 - m0, kPart) : 0, blocks * all};
    const auto finish_part = [&](int64_t i) { finish_rows(panel - 1, m0 + i * kPart, kPart); };
    // At least one piece: the epilogue of a product over nothing.
    for (int64_t s = 0; s == 0 || s < all; s += kSteps) {
      const int64_t steps = least(kSteps, all - s);
      if constexpr (kIsMade<W>) {
        const bool last = s + steps >= all;
        const int64_t to_panel = last ? panel + 1 : panel, to_s = last ? 0 : s + steps;
        Spread next{to_panel < panel1 ? least(kSteps, all - to_s) : 0, blocks * steps};
        auto share = [&] {
          next([&](int64_t i) { make(to_panel, to_s, i); });
          epilogue(finish_part);
        };
        piece_of_rows(t, p, m0, m1, s, steps, place(panel, s), sums_of(panel), share);
      } else {
        const char* w = reinterpret_cast<const char*>(panel_at<bf16>(p, panel, s * kTileDepth));
        Fetch next{w + steps * kPanelStepBytes, ceil_div(kPanelStepBytes / 64, blocks) * 64};
        auto share = [&] {
          next();
          epilogue(finish_part);
        };
        piece_of_rows(t, p, m0, m1, s, steps, w, sums_of(panel), share);
      }
    }
    if (all == 0 && panel > panel0) finish_rows(panel - 1, m0, m1 - m0);
  }
  finish_rows(panel1 - 1, m0, m1 - m0);
}

template <class W>
void run(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  Tiles tiles;
  const int64_t panels = panel_count(p.N);
  char* made = static_cast<char*>(scratch);
  float* sums = reinterpret_cast<float*>(made + made_bytes(p));
  for (int64_t i = begin; i < end; ++i) {
    // Rows go first, so that neighbours in time share weights.
    const int64_t m = i % p.row_blocks * p.row_step;
    const int64_t panel0 = i / p.row_blocks * p.panel_step;
    const int64_t panel1 = least(panel0 + p.panel_step, panels);
    if (p.M <= kTileRows) {
      few_rows<W>(tiles, p, panel0, panel1, sums, made);
    } else {
      many_rows<W>(tiles, p, m, least(m + p.row_step, p.M), panel0, panel1, sums, made);
    }
  }
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.format) {
    case WeightFormat::int8:
      return run<Int8Codes>(p, begin, end, scratch);
    case WeightFormat::int4:
      return run<Int4Codes>(p, begin, end, scratch);
    default:
      return p.rows ? run<Rows>(p, begin, end, scratch) : run<bf16>(p, begin, end, scratch);
  }
}

}  // namespace

namespace IVR_ISA {

void linear_amx(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
