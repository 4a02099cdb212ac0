// linear on matrix tiles of bytes: bf16 rows times the codes of an int8 or int4 weight.
//
// Numbers and bits are those of linear_digits.h: sums of a group are exact, whoever adds them. Up
// to kFewRows rows are a block there, which is faster than memory. The digits of more rows are
// tiles, a high and a low one for 16 rows and a group, and meet the two tiles of a panel: codes of
// int8 as they lie, those of int4 spread to bytes. Sums of a group pass through the vector units
// while the tiles of the next one are multiplied.
#include "kernels/cpu/amx.h"
#include "kernels/cpu/linear_digits.h"
#include "kernels/cpu/linear_tiles.h"

namespace ivr {
namespace {

// Of a single row's codes: the machine of docs/performance.md reads memory at 29 GB/s in one stream
// and at 37.6 in four.
constexpr int kStreams = 4;

constexpr int64_t kFewRows = 6;
constexpr int64_t kGroupCodes = kQuantGroup * kPanelColumns;

// A group of x for 16 rows: digits [high, low][16][64], then the terms of every row.
constexpr int64_t kGroupBytes = 2 * kTileBytes + kTileRows * kTermBytes;

inline char* tile_at(const LinearParams& p, int64_t tile, int64_t g) {
  return static_cast<char*>(p.workspace) + (tile * groups_of(p) + g) * kGroupBytes;
}

// The rows of x of a chunk stay in L2 for all its panels.
inline int64_t chunk_rows(const LinearParams& p) {
  constexpr int64_t kChunkBytes = 1 << 20, kLeast = 64, kMost = 512;
  const int64_t tiles = kChunkBytes / (groups_of(p) * kGroupBytes + 1);
  return tiles < kLeast / kTileRows ? kLeast : least(tiles * kTileRows, kMost);
}

void plan(LinearParams& p, int threads) {
  if (p.M <= kFewRows) return plan_block<kStreams>(p, threads);
  plan_chunks(p, chunk_rows(p), kTileRows, kChunkPanels, threads);
  p.items = ceil_div(p.M, kTileRows);
  p.workspace_size = p.items * groups_of(p) * kGroupBytes;
  p.scratch_size = kPieceGroups * kGroupCodes + p.row_step * kPanelColumns * 4;
}

void prepare(const LinearParams& p, int64_t begin, int64_t end) {
  if (p.M <= kFewRows) return prepare_blocks(p, begin, end);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t m = tile * kTileRows, rows = least(kTileRows, p.M - m);
    for (int64_t g = 0; g < groups_of(p); ++g) {
      char* digits = tile_at(p, tile, g);
      char* terms = digits + 2 * kTileBytes;
      if (rows < kTileRows) memset(digits, 0, kGroupBytes);
      for (int64_t r = 0; r < rows; ++r, terms += kTermBytes) {
        const Group group = group_of(p, m + r, g);
        for (int64_t k = 0; k < kQuantGroup; k += 4, digits += 4) {
          char both[8];
          put_digits(group.x + k, both);
          memcpy(digits, both, 4);
          memcpy(digits + kTileBytes, both + 4, 4);
        }
        memcpy(terms, &group.terms, kTermBytes);
      }
    }
  }
}

// High and low sums of a group, of the panel's left and of its right half: tiles 0 to 3.
inline void multiply_group(Tiles& t, const char* x, const char* codes) {
  t.load<4>(x, kQuantGroup);
  t.load<5>(x + kTileBytes, kQuantGroup);
  t.load<6>(codes, kPanelColumns * 4);
  t.zero<0>();
  t.zero<1>();
  t.multiply_bytes<0, 4, 6>();
  t.multiply_bytes<1, 5, 6>();
  t.load<7>(codes + 64, kPanelColumns * 4);
  t.zero<2>();
  t.zero<3>();
  t.multiply_bytes<2, 4, 7>();
  t.multiply_bytes<3, 5, 7>();
}

// 16 rows by one panel: c[16][32] (+)= the product of `groups` groups.
void multiply_tiles(Tiles& t, const char* x, Source w, int64_t groups, float* c, bool resume) {
  if (groups > 0) multiply_group(t, x, w.codes);
  for (int64_t g = 0; g < groups; ++g) {
    alignas(64) char sums[kPanelVectors][2][kTileBytes];
    t.store<0>(sums[0][0], 64);
    t.store<1>(sums[0][1], 64);
    t.store<2>(sums[1][0], 64);
    t.store<3>(sums[1][1], 64);
    const char* terms = x + 2 * kTileBytes;
    const char* scales = w.scales;
    x += kGroupBytes;
    w.codes += w.codes_group;
    w.scales += w.scales_group;
    if (g + 1 < groups) multiply_group(t, x, w.codes);
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      const F scale = load(reinterpret_cast<const bf16*>(scales) + v * kLanes);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const Terms its = terms_at(terms + r * kTermBytes);
        const I high = load_ints(sums[v][0] + r * 64), low = load_ints(sums[v][1] + r * 64);
        add_group((high << 8) + low + its.less, scale * set(its.scale), resume || g > 0,
                  c + r * kPanelColumns + v * kLanes);
      }
    }
  }
}

// A panel's codes from group g on as bytes, which int4's nibbles become at `made`.
template <class Code>
Source bytes_at(const LinearParams& p, int64_t panel, int64_t g, int64_t groups, char* made) {
  Source w = packed_at<Code>(p, panel, g);
  if constexpr (Code::kBits == 8) return w;
  constexpr int64_t kLine = kPanelColumns * 4;
  for (int64_t i = 0; i < groups; ++i) {
    const char* from = w.codes + i * w.codes_group;
    char* to = made + i * kGroupCodes;
    for (int64_t j = 0; j < kGroupCodes / 2; j += 4 * kLanes) {
      __builtin_prefetch(from + j + kAhead<1>, 0, 2);
      const I u = load_ints(from + j), low = u & 0x0f0f0f0f, high = (u >> 4) & 0x0f0f0f0f;
      char* quads = to + j / kLine * 2 * kLine + j % kLine;
      memcpy(quads, &low, sizeof(low));
      memcpy(quads + kLine, &high, sizeof(high));
    }
  }
  w.codes = made;
  w.codes_group = kGroupCodes;
  return w;
}

// A piece of a panel meets all of a chunk's rows.
template <class Code>
void multiply_chunk(Tiles& t, const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0,
                    int64_t panel1, char* made, float* sums) {
  const int64_t all = groups_of(p), tiles = ceil_div(m1 - m0, kTileRows);
  if (all == 0) memset(sums, 0, static_cast<size_t>(tiles * kTileRows * kPanelColumns) * 4);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    // At least one piece: the epilogue of a product over nothing.
    for (int64_t g = 0; g == 0 || g < all; g += kPieceGroups) {
      const int64_t groups = least(kPieceGroups, all - g);
      const int64_t bytes = panel_bytes(p.format, groups * kQuantGroup);
      Fetch next{reinterpret_cast<const char*>(panel_at<Code>(p, panel, g * kQuantGroup)) + bytes,
                 ceil_div(bytes, tiles * 64) * 64};
      const Source w = bytes_at<Code>(p, panel, g, groups, made);
      for (int64_t m = m0; m < m1; m += kTileRows) {
        float* c = sums + (m - m0) * kPanelColumns;
        next();
        multiply_tiles(t, tile_at(p, m / kTileRows, g), w, groups, c, g > 0);
        if (g + groups < all) continue;
        finish(p, c, kPanelColumns, m, least(kTileRows, m1 - m), panel * kPanelColumns);
      }
    }
  }
}

template <class Code>
void run(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  if (p.M <= kFewRows) {
    return for_chunks(p, begin, end, [&](int64_t, int64_t, int64_t panel0, int64_t panel1) {
      one_block<Code, kStreams>(p, panel0, panel1, static_cast<float*>(scratch));
    });
  }
  Tiles tiles;
  char* made = static_cast<char*>(scratch);
  float* sums = reinterpret_cast<float*>(made + kPieceGroups * kGroupCodes);
  for_chunks(p, begin, end, [&](int64_t m0, int64_t m1, int64_t panel0, int64_t panel1) {
    multiply_chunk<Code>(tiles, p, m0, m1, panel0, panel1, made, sums);
  });
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  with_codes(p.format, [&](auto codes) { run<decltype(codes)>(p, begin, end, scratch); });
}

}  // namespace

namespace IVR_ISA {

void linear_codes_amx(LinearSteps& steps) { steps = {plan, prepare, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
