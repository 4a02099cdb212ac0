// linear on bf16 matrix tiles: two tiles of rows by one panel (32 x 32) in four tiles of sums.
//
// A chunk's rows of x stay in L2 (kRowBytes) for all its panels; a piece of a panel of kDepth stays
// in L1 for all its rows while the next piece, which follows in memory, is fetched into L2. Sums
// wait in fp32 between pieces, which changes no bit: per element all is one chain over K. x is read
// where it is; only an incomplete tile (K % 32, M % 16) is copied and padded with zeros. Up to 16
// rows, one tile of rows meets two panels: two streams from memory.
//
// Quantised weights become bf16 in a small buffer, a piece of a panel before it meets its rows.
#include "kernels/cpu/amx.h"
#include "kernels/cpu/linear_codes.h"
#include "kernels/cpu/linear_epilogue.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPanelStepBytes = 2 * kTileBytes;  // of a panel, per 32 k
constexpr int64_t kSteps = 16;                       // tile steps of a piece: 32 KB of a panel
constexpr int64_t kPieceBytes = kSteps * kPanelStepBytes;
constexpr int64_t kRowBytes = 1 << 20;
constexpr int64_t kMaxRows = 512;
constexpr int64_t kStreamAhead = 4096;  // bytes of each stream

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t steps_of(const LinearParams& p) { return ceil_div(p.K, kTileDepth); }

// The first of the row tiles that are copied; those before it are read from x.
inline int64_t first_copied(const LinearParams& p) {
  return p.K % kTileDepth == 0 ? p.M / kTileRows : 0;
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
  p.items = tiles - first_copied(p);
  p.workspace_size = p.items * steps_of(p) * kTileBytes;
  // Two panels of one tile's rows, or one panel of a chunk's rows.
  const int64_t rows = p.row_step < 2 * kTileRows ? 2 * kTileRows : p.row_step;
  p.scratch_size = rows * kPanelColumns * 4 + kPieceBytes;
}

// Copies incomplete row tiles to [K/32][16][32], zero-padded.
void prepare(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m0 = (first_copied(p) + item) * kTileRows;
    char* to = static_cast<char*>(p.workspace) + item * steps * kTileBytes;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const bf16* from = static_cast<const bf16*>(p.x) + (m0 + r) * p.x_m;
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t k = s * kTileDepth;
        const int64_t n = m0 + r < p.M ? least(kTileDepth, p.K - k) : 0;
        char* row = to + s * kTileBytes + r * 64;
        if (n > 0) memcpy(row, from + k, static_cast<size_t>(n) * 2);
        if (n < kTileDepth) memset(row + n * 2, 0, static_cast<size_t>(kTileDepth - n) * 2);
      }
    }
  }
}

// How much of what follows in memory to fetch into L2 at each step.
struct Ahead {
  const char* at;
  int64_t bytes;
};

inline void fetch(Ahead& ahead) {
  for (int64_t b = 0; b < ahead.bytes; b += 64) __builtin_prefetch(ahead.at + b, 0, 2);
  ahead.at += ahead.bytes;
}

// 32 rows by one panel. c: [32][32].
void block_2x2(Tiles& t, RowTile a0, RowTile a1, const char* w, int64_t steps, float* c,
               bool resume, Ahead ahead) {
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
    fetch(ahead);
    t.multiply<2, 5, 6>();
    t.multiply<3, 5, 7>();
  }
  t.store<0>(c, kRow);
  t.store<1>(c + 16, kRow);
  t.store<2>(c1, kRow);
  t.store<3>(c1 + 16, kRow);
}

// 16 rows by one panel. c: [16][32].
void block_1x2(Tiles& t, RowTile a, const char* w, int64_t steps, float* c, bool resume,
               Ahead ahead) {
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
    fetch(ahead);
    t.multiply<1, 4, 7>();
  }
  t.store<0>(c, kRow);
  t.store<1>(c + 16, kRow);
}

// 16 rows by two panels. c: [16][64].
void block_1x4(Tiles& t, RowTile a, const char* w0, const char* w1, int64_t steps, float* c,
               bool resume, Ahead ahead0, Ahead ahead1) {
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
    fetch(ahead0);
    t.multiply<1, 4, 6>();
    t.load<7>(w1 + s * kPanelStepBytes, 128);
    t.load<5>(w1 + s * kPanelStepBytes + 64, 128);
    t.multiply<2, 4, 7>();
    fetch(ahead1);
    t.multiply<3, 4, 5>();
  }
  t.store<0>(c, kRow);
  t.store<1>(c + 16, kRow);
  t.store<2>(c + 32, kRow);
  t.store<3>(c + 48, kRow);
}

// Steps [s, s + steps) of a panel as pairs of bf16: where they lie, or decoded. s begins a group.
template <class W>
const char* as_pairs(const LinearParams& p, int64_t panel, int64_t s, int64_t steps, char* made) {
  const W* w = panel_at<W>(p, panel, s * kTileDepth);
  if constexpr (kIsCode<W>) {
    decode(w, 0, steps * kTileDepth / 2, reinterpret_cast<uint32_t*>(made));
    return made;
  } else {
    return reinterpret_cast<const char*>(w);
  }
}

// bf16 passes at once, in the order of memory; of codes, half a piece of two panels at a time.
template <class W>
void few_rows(Tiles& t, const LinearParams& p, int64_t panel0, int64_t panel1, float* sums,
              char* made) {
  const int64_t all = steps_of(p);
  const int64_t piece = kIsCode<W> ? kSteps / 2 : all;
  const int64_t fetched = kIsCode<W> ? 0 : kPanelStepBytes;
  for (int64_t panel = panel0; panel < panel1; panel += 2) {
    const bool both = panel + 1 < panel1;
    for (int64_t s = 0; s == 0 || s < all; s += piece) {
      const int64_t steps = least(piece, all - s);
      RowTile a = row_tile(p, 0);
      a.base += s * a.step;
      const char* w0 = as_pairs<W>(p, panel, s, steps, made);
      const Ahead ahead0{w0 + kStreamAhead, fetched};
      if (both) {
        const char* w1 = as_pairs<W>(p, panel + 1, s, steps, made + kPieceBytes / 2);
        block_1x4(t, a, w0, w1, steps, sums, s > 0, ahead0, {w1 + kStreamAhead, fetched});
      } else {
        block_1x2(t, a, w0, steps, sums, s > 0, ahead0);
      }
      if (steps == 0) break;
    }
    const int64_t stride = both ? 2 * kPanelColumns : kPanelColumns;
    finish(p, sums, stride, 0, p.M, panel * kPanelColumns);
    if (both) finish(p, sums + kPanelColumns, stride, 0, p.M, (panel + 1) * kPanelColumns);
  }
}

template <class W>
void many_rows(Tiles& t, const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0,
               int64_t panel1, float* sums, char* made) {
  const int64_t all = steps_of(p);
  const int64_t tile0 = m0 / kTileRows, tile1 = ceil_div(m1, kTileRows);
  const int64_t pairs = ceil_div(tile1 - tile0, 2);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    // At least one piece: the epilogue of a product over nothing.
    for (int64_t s0 = 0; s0 == 0 || s0 < all; s0 += kSteps) {
      const int64_t steps = least(kSteps, all - s0);
      const char* w = as_pairs<W>(p, panel, s0, steps, made);
      // Each pair of row tiles fetches its share of the next piece.
      const int64_t share = kIsCode<W> ? 0 : ceil_div(kPanelStepBytes / 64, pairs) * 64;
      Ahead ahead{w + steps * kPanelStepBytes, share};
      for (int64_t tile = tile0; tile < tile1; tile += 2) {
        float* c = sums + (tile - tile0) * kTileRows * kPanelColumns;
        RowTile a0 = row_tile(p, tile);
        a0.base += s0 * a0.step;
        if (tile + 1 < tile1) {
          RowTile a1 = row_tile(p, tile + 1);
          a1.base += s0 * a1.step;
          block_2x2(t, a0, a1, w, steps, c, s0 > 0, ahead);
        } else {
          block_1x2(t, a0, w, steps, c, s0 > 0, ahead);
        }
        ahead.at += steps * share;
        if (s0 + steps >= all) {
          const int64_t m = tile * kTileRows;
          finish(p, c, kPanelColumns, m, least(m1 - m, 2 * kTileRows), panel * kPanelColumns);
        }
      }
    }
  }
}

template <class W>
void run(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  Tiles tiles;
  const int64_t panels = panel_count(p.N);
  char* made = static_cast<char*>(scratch);
  float* sums = reinterpret_cast<float*>(made + kPieceBytes);
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
      return run<bf16>(p, begin, end, scratch);
  }
}

}  // namespace

namespace IVR_ISA {

void linear_amx(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
