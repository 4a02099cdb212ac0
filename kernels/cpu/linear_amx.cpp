// linear on bf16 matrix tiles: two tiles of rows by one panel (32 x 32) in four tiles of sums.
//
// A chunk's rows of x meet a stretch of K of every panel, then the next: a stretch of x and the
// sums of all panels stay in L2. A piece of a panel's stretch stays in L1 for all the rows. Sums
// wait in fp32 meanwhile, which changes no bit: a step of 32 k adds its own sum to what there is. x
// is read where it is; only an incomplete tile (K % 32, M % 16) is copied and padded with zeros. Up
// to 16 rows, one tile of rows meets two panels: two streams from memory.
//
// Packed weights are tiles where they lie. Rows of W in place become tiles in a small buffer: the
// next piece is made between the tile products of this one, which leave the vector units idle; so
// is the epilogue of the panel before. Up to 16 rows of x change sides: rows of W are tiles as they
// are when they come first, x the second operand and the product transposed. Factors and their
// order in a sum are the same, and so are the bits.
#include "kernels/cpu/amx.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/linear_rows.h"
#include "kernels/cpu/linear_tiles.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

constexpr int64_t kPanelStepBytes = 2 * kTileBytes;  // of a panel, per 32 k
// Tile steps of a piece, 16 KB of a panel. Between two uses of its lines pass 16 KB of x and the
// other lines of the piece: together less than L1's 48 KB.
constexpr int64_t kSteps = 8;
constexpr int64_t kPieceBytes = kSteps * kPanelStepBytes;
// Tile steps of a stretch, and rows of a chunk: 0.4 MB of x, as much of the next stretch, and sums
// of 16 panels in 0.75 MB. What is read again for every stretch or chunk comes from L3, which is no
// faster than half the tiles want it.
constexpr int64_t kStretch = 2 * kSteps;
constexpr int64_t kMostRows = 384;
constexpr int64_t kStreamAhead = 4096;  // bytes of each stream

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
  if (p.M <= kTileRows) {
    plan_chunks(p, kTileRows, kTileRows, panel_count(p.N) >= 32 * threads ? 4 : 2, threads);
  } else {
    plan_chunks(p, kMostRows, 2 * kTileRows, kChunkPanels, threads);
  }
  const bool as_second = takes_second(p);
  p.items = as_second ? steps_of(p) : ceil_div(p.M, kTileRows) - first_copied(p);
  p.workspace_size = p.items * (as_second ? 1 : steps_of(p)) * kTileBytes;
  p.scratch_size = made_bytes(p) + p.panel_step * p.row_step * kPanelColumns * 4;
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
// order: while a block of 16 rows (32 KB) is, the block that follows is fetched into L2, the same
// rows further on or the 16 rows behind them. kStreams rows at a time, each from end to end.
class FetchRows {
 public:
  // Before the first of `steps` steps.
  FetchRows(const bf16* const* rows, int64_t steps) : next_(rows), steps_(steps) {}

  // At each step.
  void operator()() {
    if (left_ == 0) begin_block();
    --left_;
    for (int64_t i = 0; i < share_ && row_ < kStreamRows; ++i) {
#pragma GCC unroll 4
      for (int64_t stream = 0; stream < kStreams; ++stream) {
        const bf16* row = next_[stream * kStreamRows + row_];
        __builtin_prefetch(row + (begin_ + at_) * kTileDepth, 0, 2);
      }
      if (++at_ < length_) continue;
      at_ = 0;
      ++row_;
    }
  }

 private:
  static constexpr int64_t kMost = 32, kStreams = 4, kStreamRows = kTileRows / kStreams;

  int64_t length_from(int64_t begin) const { return least(kMost, steps_ - begin); }
  void begin_block() {
    left_ = length_from(begin_);
    begin_ += left_;
    if (begin_ == steps_) {
      begin_ = 0;
      next_ += kTileRows;
    }
    length_ = length_from(begin_);
    share_ = ceil_div(length_ * kStreamRows, left_);
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

void few_rows(Tiles& t, const LinearParams& p, int64_t panel0, int64_t panel1, float* sums) {
  for (int64_t panel = panel0; panel < panel1; panel += 2) {
    const bool both = panel + 1 < panel1;
    two_packed(t, p, panel, both, sums);
    const int64_t stride = both ? 2 * kPanelColumns : kPanelColumns;
    finish(p, sums, stride, 0, p.M, panel * kPanelColumns);
    if (both) finish(p, sums + kPanelColumns, stride, 0, p.M, (panel + 1) * kPanelColumns);
  }
}

// A chunk of many rows. InPlace: W is not packed.
template <bool InPlace>
class Chunk {
 public:
  Chunk(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1, char* made,
        float* sums)
      : p_(p), m0_(m0), m1_(m1), panel0_(panel0), panel1_(panel1), made_(made), sums_(sums) {}

  void run(Tiles& t) {
    if (all_ == 0) {
      memset(sums_, 0, static_cast<size_t>(p_.panel_step * p_.row_step * kPanelColumns) * 4);
      for (int64_t panel = panel0_; panel < panel1_; ++panel) finish_rows(panel, m0_, m1_ - m0_);
      return;
    }
    const Piece first = {panel0_, 0};
    if constexpr (InPlace) {
      for (int64_t i = 0; i < 2 * steps(first); ++i) make_tile(first, i, made_);
    }
    Spread x{0, 1}, epilogue{0, 1};
    int64_t place = 0;
    for (Piece w = first, next; w.s < all_; w = next) {
      next = after(w);
      const int64_t begin = w.s / kStretch * kStretch, end = least(begin + kStretch, all_);
      if (w.s == begin) {
        const int64_t calls = blocks_ * (end - begin);
        if (w.panel == panel0_) x = {end < all_ ? m1_ - m0_ : 0, calls * (panel1_ - panel0_)};
        const bool ended = end == all_ && w.panel > panel0_;
        epilogue = {ended ? ceil_div(m1_ - m0_, kPart) : 0, calls};
      }
      const auto also = [&] {
        x([&](int64_t i) { fetch_x(i, end); });
        epilogue([&](int64_t i) { finish_rows(w.panel - 1, m0_ + i * kPart, kPart); });
      };
      if constexpr (InPlace) {
        const char* tiles = made_ + place * kPieceBytes;
        place = 1 - place;
        char* to = made_ + place * kPieceBytes;
        Spread making{next.s < all_ ? 2 * steps(next) : 0, blocks_ * steps(w)};
        const auto share = [&] {
          making([&](int64_t i) { make_tile(next, i, to); });
          also();
        };
        multiply(t, w, tiles, share);
      } else {
        Fetch fetch{packed(next.s < all_ ? next : first),
                    ceil_div(kPanelStepBytes / 64, blocks_) * 64};
        const auto share = [&] {
          fetch();
          also();
        };
        multiply(t, w, packed(w), share);
      }
    }
    finish_rows(panel1_ - 1, m0_, m1_ - m0_);
  }

 private:
  static constexpr int64_t kPart = 4;  // rows of an epilogue

  // Up to kSteps steps of a panel, from s on.
  struct Piece {
    int64_t panel, s;
  };
  int64_t steps(Piece w) const { return least(kSteps, all_ - w.s); }
  // Pieces come stretch by stretch, therein panel by panel; beyond the last, s is all of K.
  Piece after(Piece w) const {
    const int64_t begin = w.s / kStretch * kStretch, end = least(begin + kStretch, all_);
    if (w.s + kSteps < end) return {w.panel, w.s + kSteps};
    if (w.panel + 1 < panel1_) return {w.panel + 1, begin};
    return {panel0_, end};
  }
  // The same of the panel that follows; after the last piece the first, for the next chunk.
  Piece a_panel_later(Piece w) const {
    if (w.panel + 1 < panel1_) return {w.panel + 1, w.s};
    return {panel0_, w.s + kStretch < all_ ? w.s + kStretch : w.s % kStretch};
  }

  float* sums_of(int64_t panel, int64_t m) const {
    return sums_ + ((panel - panel0_) * p_.row_step + m - m0_) * kPanelColumns;
  }
  void finish_rows(int64_t panel, int64_t m, int64_t rows) const {
    finish(p_, sums_of(panel, m), kPanelColumns, m, least(rows, m1_ - m), panel * kPanelColumns);
  }

  // Row i of the stretch of x from step s on is fetched into L2.
  void fetch_x(int64_t i, int64_t s) const {
    const RowTile a = row_tile(p_, (m0_ + i) / kTileRows);
    const char* at = a.base + i % kTileRows * a.stride;
    for (const int64_t end = least(s + kStretch, all_); s < end; ++s) {
      __builtin_prefetch(at + s * a.step, 0, 2);
    }
  }

  // Tile i of a piece, left and right columns in turns: 32 k as pairs of bf16. What is made a panel
  // later is fetched into L2.
  void make_tile(Piece w, int64_t i, char* to) const {
    const int64_t step = i / 2, right = i % 2;
    const Piece later = a_panel_later(w);
    const bf16* const* next = rows_of(p_, later.panel) + right * kTileRows;
    for (int64_t r = 0; r < kTileRows; ++r) {
      __builtin_prefetch(next[r] + (later.s + step) * kTileDepth, 0, 2);
    }
    put_square(rows_of(p_, w.panel) + right * kTileRows, w.s + step, p_.K,
               to + step * kPanelStepBytes + right * 64, kPanelColumns * 4);
  }

  const char* packed(Piece w) const {
    return reinterpret_cast<const char*>(panel_at<bf16>(p_, w.panel, w.s * kTileDepth));
  }

  // A piece, w, meets all rows.
  template <class Share>
  void multiply(Tiles& t, Piece piece, const char* w, Share& share) const {
    for (int64_t m = m0_; m < m1_; m += 2 * kTileRows) {
      RowTile a0 = row_tile(p_, m / kTileRows);
      a0.base += piece.s * a0.step;
      float* c = sums_of(piece.panel, m);
      if (m + kTileRows < m1_) {
        RowTile a1 = row_tile(p_, m / kTileRows + 1);
        a1.base += piece.s * a1.step;
        block_2x2(t, a0, a1, w, steps(piece), c, piece.s > 0, share);
      } else {
        block_1x2(t, a0, w, steps(piece), c, piece.s > 0, share);
      }
    }
  }

  const LinearParams& p_;
  const int64_t m0_, m1_, panel0_, panel1_;
  char* const made_;  // room for two pieces
  float* const sums_;
  const int64_t all_ = steps_of(p_), blocks_ = ceil_div(m1_ - m0_, 2 * kTileRows);
};

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  Tiles t;
  char* made = static_cast<char*>(scratch);
  float* sums = reinterpret_cast<float*>(made + made_bytes(p));
  for_chunks(p, begin, end, [&](int64_t m0, int64_t m1, int64_t panel0, int64_t panel1) {
    if (takes_second(p)) {
      few_rows_in_place(t, p, panel0, panel1, sums, made);
    } else if (p.M <= kTileRows) {
      few_rows(t, p, panel0, panel1, sums);
    } else if (p.rows) {
      Chunk<true>(p, m0, m1, panel0, panel1, made, sums).run(t);
    } else {
      Chunk<false>(p, m0, m1, panel0, panel1, made, sums).run(t);
    }
  });
}

}  // namespace

namespace IVR_ISA {

void linear_amx(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
