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

// Pairs [k, k + 16) of 16 rows, transposed; zeros beyond K. Whole squares are gathered in blocks of
// four pairs: loads into lanes take the place of half the shuffles, which share their units with
// dot products.
inline void load_square(const bf16* const* rows, int64_t k, int64_t K, F (&v)[kLanes]) {
  const int64_t n = K - 2 * k < 2 * kLanes ? K - 2 * k : 2 * kLanes;
  if (n < 2 * kLanes) {
    const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << n) - 1);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      v[r].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, rows[r] + 2 * k));
    }
    return transpose(v);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kLanes; j += 4) {
    __m512 t[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const auto block = [&](int row) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(rows[row] + 2 * (k + j)));
      };
      t[r] = _mm512_castps128_ps512(block(r));
      t[r] = _mm512_mask_broadcast_f32x4(t[r], 0x00f0, block(4 + r));
      t[r] = _mm512_mask_broadcast_f32x4(t[r], 0x0f00, block(8 + r));
      t[r] = _mm512_mask_broadcast_f32x4(t[r], 0xf000, block(12 + r));
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(t[0], t[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(t[0], t[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(t[2], t[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(t[2], t[3]));
    v[j].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    v[j + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[j + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    v[j + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
}

}  // namespace
}  // namespace ivr
