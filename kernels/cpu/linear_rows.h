// Rows of W that stay where they are, as in a mapped file: they become pairs of k on their way to
// a product.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

// The rows of a panel; those of the next one follow, also after the last.
inline const bf16* const* rows_of(const LinearParams& p, int64_t panel) {
  return reinterpret_cast<const bf16* const*>(p.rows) + panel * kPanelColumns;
}

// Pairs [k + from, k + to) of 16 rows, transposed to v[from .. to); zeros elsewhere and beyond K.
// Nothing else is read.
inline void load_part(const bf16* const* rows, int64_t k, int64_t from, int64_t to, int64_t K,
                      F (&v)[kLanes]) {
  const int64_t end = least(2 * to, K - 2 * k);
  const uint64_t below = end > 0 ? (uint64_t{1} << end) - 1 : 0;
  const __mmask32 some = static_cast<__mmask32>(below & ~((uint64_t{1} << 2 * from) - 1));
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    v[r].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, rows[r] + 2 * k));
  }
  transpose(v);
}

// Step j of 16 in which put(i, v[i]) gets the same of all 16 pairs from k on; t is kept from step
// to step. Rows are loaded in halves, those of two rows into one vector: so loads take the place of
// shuffles, which share their units with dot products. Both halves of a row at once: rows a
// multiple of 4 KB apart share one set of L1, which does not hold 16 lines.
template <class Put>
[[gnu::always_inline]] inline void square_step(int j, const bf16* const* rows, int64_t k,
                                               F (&t)[2][kLanes / 2], Put&& put) {
  constexpr int kHalf = kLanes / 2;
  if (j < 4) {
#pragma GCC unroll 2
    for (int r = 2 * j; r < 2 * j + 2; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const auto half = [&](int row) {
          return _mm256_loadu_ps(reinterpret_cast<const float*>(rows[row] + 2 * k) + i * kHalf);
        };
        t[i][r].v = _mm512_insertf32x8(_mm512_castps256_ps512(half(r)), half(kHalf + r), 1);
      }
    }
  } else if (j < kHalf) {
    // t[i][c]: pairs c and 4 + c of rows 0 to 3, then of rows 8 to 11; t[i][4 + c]: of the others.
    transpose_blocks(t[j / 2 % 2] + j % 2 * 4);
  } else {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    const int i = j / 4 % 2, c = j % 4;
    put(i * kHalf + c, F{_mm512_permutex2var_ps(t[i][c].v, low, t[i][4 + c].v)});
    put(i * kHalf + 4 + c, F{_mm512_permutex2var_ps(t[i][c].v, high, t[i][4 + c].v)});
  }
}

// All 16 pairs from k on.
inline void load_square(const bf16* const* rows, int64_t k, int64_t K, F (&v)[kLanes]) {
  if (K - 2 * k < 2 * kLanes) return load_part(rows, k, 0, kLanes, K, v);
  F t[2][kLanes / 2];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    square_step(j, rows, k, t, [&](int i, F x) { v[i] = x; });
  }
}

// Where squares of 16 rows should end: so many pairs before the multiples of 16. At the ends of
// cache lines where the rows share one set of L1, else anywhere.
inline int64_t pairs_before(const bf16* const* rows) {
  constexpr uintptr_t kLine = 64, kWay = 4096;
  const uintptr_t first = reinterpret_cast<uintptr_t>(rows[0]);
  uintptr_t differ = 0;
  for (int r = 1; r < kLanes; ++r) differ |= first ^ reinterpret_cast<uintptr_t>(rows[r]);
  return differ % kWay ? 0 : static_cast<int64_t>(first % kLine / 4);
}

}  // namespace
}  // namespace ivr
