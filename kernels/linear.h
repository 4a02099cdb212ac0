// linear: out = residual + scale * act(x W^T + bias), computed in fp32 and rounded once.
//
// On CUDA the weight is plain, [N, K] row by row; see kernels/cuda/linear.cuh. The rest of this
// comment is about the CPU.
//
// Weights are packed once, in one layout for every instruction set and every M: panels of 32
// columns, zero-padded. A kernel that reads rows where they lie treats them as panels too.
// f32: [ceil(N/32)][K][32].
// bf16: [ceil(N/32)][K'/2][32][2], K' = K rounded up to 32. A pair of k stands together: 16 pairs
// of 16 columns are one matrix tile (row stride 128 bytes); 16 columns of one pair are one 512-bit
// load, whose low halves are the even and whose high halves are the odd k.
// int8, int4: [ceil(N/32)][ceil(K/64)] groups of 64 k. A group is 32 scales in bf16, then the
// codes. int8: [16][32][4], a byte q + 128 each; four k of 16 columns are one 512-bit operand of an
// integer dot product. int4: [8][32][4], a byte for two, q + 8 of k in the low and of k + 4 in the
// high half. A weight is q * scale, exact in fp32, and the product that of the dequantised
// weight, bit for bit, for x in fp32; for x in bf16 codes are multiplied as they are
// (kernels/cpu/linear_digits.h).
// Scales are bf16 because codes are chosen for the rounded scale: nothing is lost, and int4 moves
// 6 % less.
//
// The weight of a gated product has its rows in turns, kGateColumns of the gate and as many of up,
// so that a panel holds both.
//
// Every element of the product is a sum over k in one order, the same for every M: chains of
// multiply-adds from zero over pieces of fixed length, the pieces added in order. Dot products of
// pairs take the odd k of a pair first. On matrix tiles a piece is 32 k, the sum of a chain over
// its even and one over its odd k. Both count denormals as zero. So a row's bits depend neither on
// the other rows nor on how the work is cut.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

enum class WeightFormat : int32_t { f32 = 0, bf16 = 1, int8 = 2, int4 = 3, fp8 = 4 };
// The gates of kernels/gated_activation.h come last: swiglu is that of silu.
enum class Activation : int32_t { none = 0, gelu = 1, silu = 2, swiglu = 3, swiglu_gpt_oss = 4 };
constexpr bool is_gated(Activation a) { return a >= Activation::swiglu; }

constexpr int64_t kPanelColumns = 32;
constexpr int64_t kTileDepth = 32;  // k per bf16 matrix tile
constexpr int64_t kGateColumns = kPanelColumns / 2;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t panel_count(int64_t N) { return ceil_div(N, kPanelColumns); }
constexpr int64_t kQuantGroup = 64;                 // k that share a scale
constexpr int64_t kScaleBytes = kPanelColumns * 2;  // of a group

constexpr bool is_quantised(WeightFormat format) {
  return format == WeightFormat::int8 || format == WeightFormat::int4;
}
// Elements of one panel; bytes where it is quantised.
constexpr int64_t panel_size(WeightFormat format, int64_t K) {
  const int64_t groups = ceil_div(K, kQuantGroup);
  switch (format) {
    case WeightFormat::int8:
      return groups * (kScaleBytes + kQuantGroup * kPanelColumns);
    case WeightFormat::int4:
      return groups * (kScaleBytes + kQuantGroup * kPanelColumns / 2);
    case WeightFormat::bf16:
      return ceil_div(K, kTileDepth) * kTileDepth * kPanelColumns;
    default:
      return K * kPanelColumns;
  }
}

constexpr int64_t panel_bytes(WeightFormat format, int64_t K) {
  const int64_t size = format == WeightFormat::f32 ? 4 : format == WeightFormat::bf16 ? 2 : 1;
  return panel_size(format, K) * size;
}

struct LinearParams {
  const void* x;       // [M, K]
  const void* weight;  // packed, null where rows are given; on CUDA [N, K]
  // The rows of an unpacked weight, null where it is packed: panel_count(N) * 32 pointers to K
  // elements each, any row beyond N, and one panel more that is fetched from but not read.
  const void* const* rows;
  const void* bias;      // [N] or null; of a gated product the gate's, then those of up
  const void* residual;  // [M, N] or null; may be out
  const void* scale;     // [N] or null
  void* out;             // [M, N]; of a gated product [M, N / 2]
  int64_t M, N, K;
  int64_t x_m, residual_m, out_m;  // row strides in elements
  Activation activation;           // gelu is exact; a gate stands without residual and scale
  DType dtype;                     // f32 or bf16: of x, bias and scale
  DType out_dtype;                 // of out and residual: dtype, or f32
  WeightFormat format;             // of weight: dtype's, int8 or int4
  bool decode;                     // CUDA: the kernel for few rows, whatever M is

  // Filled in by `plan`. Work is cut into chunks of row_step rows by panel_step panels.
  int64_t row_step, panel_step;
  int64_t row_blocks, panel_blocks;
  int64_t items;           // pieces of `prepare`, 0 if there is nothing to prepare
  int64_t workspace_size;  // bytes, shared by all threads: x as the kernel wants to read it
  int64_t scratch_size;    // bytes, one per thread
  void* workspace;         // 64-byte aligned
};

// The steps of one product, all of the same instruction set: plan, then prepare over [0, items),
// then compute over [0, row_blocks * panel_blocks).
struct LinearSteps {
  void (*plan)(LinearParams& p, int threads);
  void (*prepare)(const LinearParams& p, int64_t begin, int64_t end);
  void (*compute)(const LinearParams& p, int64_t begin, int64_t end, void* scratch);
};

IVR_CPU_KERNEL(linear, LinearSteps& steps)
IVR_CPU_KERNEL(linear_codes, LinearSteps& steps)  // bf16 by int8, int4
IVR_DOT_KERNEL(linear_dot, LinearSteps& steps)    // bf16 by bf16
IVR_DOT_KERNEL(linear_codes, LinearSteps& steps)
IVR_AMX_KERNEL(linear_amx, LinearSteps& steps)
IVR_AMX_KERNEL(linear_codes_amx, LinearSteps& steps)

// Packs one panel. rows: 32 pointers to K elements, null for columns beyond N.
IVR_CPU_KERNEL(pack_panel, const void* const* rows, int64_t K, WeightFormat format, void* panel)
// The same for int8 and int4, of rows of f32 or bf16. finite: whether they hold neither NaN nor
// infinities, for which there are no codes.
IVR_CPU_KERNEL(quantise_panel, const void* const* rows, int64_t K, DType dtype, WeightFormat format,
               void* panel, bool& finite)

}  // namespace ivr
