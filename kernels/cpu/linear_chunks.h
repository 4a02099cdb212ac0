// Where a packed weight's panels lie, and how a product is cut into chunks of rows by panels.
#pragma once

#include "kernels/linear.h"

namespace ivr {
namespace {

template <class T>
const T* beside(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

// A panel from k on, which begins a group.
template <class W>
const W* panel_at(const LinearParams& p, int64_t panel, int64_t k) {
  return beside(static_cast<const W*>(p.weight),
                panel * panel_bytes(p.format, p.K) + panel_bytes(p.format, k));
}

// Of groups of at most `most` rows the even ones: a group of few keeps the multipliers waiting.
inline int64_t even_rows(int64_t rows, int64_t most) {
  const int64_t groups = ceil_div(rows, most);
  return groups > 0 ? ceil_div(rows, groups) : 1;
}

// Even blocks of at most `rows` rows, whole units of them, by `panels` panels or fewer: where there
// are few chunks, threads would wait for the last one.
inline void plan_chunks(LinearParams& p, int64_t rows, int64_t unit, int64_t panels, int threads) {
  const int64_t all = panel_count(p.N);
  p.row_step = ceil_div(ceil_div(p.M, ceil_div(p.M, rows)), unit) * unit;
  p.row_blocks = ceil_div(p.M, p.row_step);
  p.panel_step = panels;
  while (p.panel_step > 1 && p.row_blocks * ceil_div(all, p.panel_step) < 6 * threads) {
    p.panel_step /= 2;
  }
  p.panel_blocks = ceil_div(all, p.panel_step);
}

// chunk(m0, m1, panel0, panel1) for the chunks [begin, end). Rows go first, so that neighbours in
// time share weights.
template <class Chunk>
void for_chunks(const LinearParams& p, int64_t begin, int64_t end, Chunk&& chunk) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t m = i % p.row_blocks * p.row_step, panel = i / p.row_blocks * p.panel_step;
    chunk(m, least(m + p.row_step, p.M), panel, least(panel + p.panel_step, panel_count(p.N)));
  }
}

}  // namespace
}  // namespace ivr
