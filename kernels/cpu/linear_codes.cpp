// linear on integer multiply-adds: bf16 rows times the codes of an int8 or int4 weight.
//
// More rows than a block's take a piece of a panel at a time, as in linear_dot.cpp.
#include "kernels/cpu/linear_chunks.h"
#include "kernels/cpu/linear_digits.h"

namespace ivr {
namespace {

constexpr int64_t kRowStep = 360;
constexpr int64_t kPanelStep = 8;
constexpr int64_t kFewRows = 36;  // below, the weights pass once, in the order of memory

void plan(LinearParams& p, int threads) {
  if (p.M <= kRows) return plan_block<1>(p, threads);
  plan_chunks(p, kRowStep, block_rows(p), kPanelStep, threads);
  p.items = ceil_div(p.M, block_rows(p));
  p.workspace_size = p.M * groups_of(p) * kRowBytes;
  p.scratch_size = p.row_step * p.panel_step * kPanelColumns * 4;
}

// A piece of every panel, then the next piece: the rows of x stay in L2. Few rows stay there
// anyway, and take one panel after the other in the order of memory.
template <class Code>
void blocks(const LinearParams& p, int64_t m0, int64_t m1, int64_t panel0, int64_t panel1,
            float* sums) {
  const int64_t all = groups_of(p), panels = panel1 - panel0, most = block_rows(p);
  const int64_t pieces = all == 0 ? 1 : ceil_div(all, kPieceGroups);
  const bool few = m1 - m0 < kFewRows;
  if (all == 0) memset(sums, 0, static_cast<size_t>((m1 - m0) * panels * kPanelColumns) * 4);
  for (int64_t i = 0; i < pieces * panels; ++i) {
    const int64_t panel = few ? i / pieces : i % panels;
    const int64_t g = (few ? i % pieces : i / panels) * kPieceGroups;
    const int64_t groups = least(kPieceGroups, all - g);
    const Source w = packed_at<Code>(p, panel0 + panel, g);
    for (int64_t m = m0; m < m1; m += most) {
      const int64_t rows = least(m1 - m, most);
      float* c = sums + (panel * (m1 - m0) + m - m0) * kPanelColumns;
      multiply_for<Code::kBits>(rows)(group_at(p, m, rows, g), w, groups, c, g > 0);
      if (g + groups >= all) finish(p, c, kPanelColumns, m, rows, (panel0 + panel) * kPanelColumns);
    }
  }
}

template <class Code>
void run(const LinearParams& p, int64_t begin, int64_t end, float* sums) {
  if (p.M <= kRows) return one_block<Code, 1>(p, begin, end, sums);
  for_chunks(p, begin, end, [&](int64_t m0, int64_t m1, int64_t panel0, int64_t panel1) {
    blocks<Code>(p, m0, m1, panel0, panel1, sums);
  });
}

void compute(const LinearParams& p, int64_t begin, int64_t end, void* scratch) {
  with_codes(p.format, [&](auto codes) {
    run<decltype(codes)>(p, begin, end, static_cast<float*>(scratch));
  });
}

}  // namespace

namespace IVR_ISA {

void linear_codes(LinearSteps& steps) { steps = {plan, prepare_blocks, compute}; }

}  // namespace IVR_ISA
}  // namespace ivr
