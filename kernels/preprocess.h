// preprocess: an RGB picture becomes normalised square tiles.
//
// The picture is resized to (columns*S, rows*S) and cut into tiles row by row; each byte is
// replaced by its normalised value. The thumbnail (the original resized to S x S) is a second
// target with one tile.
//
// The resize is Pillow's bicubic for 8-bit pictures, bit for bit: separable, antialiased (the
// support grows with the reduction), weights in fixed point with 22 fractional bits, rounded and
// clamped to a byte after each pass. Weights are tables made by the host in double precision, so
// that every instruction set uses the same ones. Which pass comes first changes the rounding, so it
// is an argument.
//
// Two stages, each split into blocks that any thread can take; the second starts when the first is
// done:
//   preprocess_first    image -> targets' mid      the first pass
//   preprocess_second   targets' mid -> out        the second pass, table, planes of each tile
#pragma once

#include "kernels/cpu/isa.h"

namespace ivr {

// Fractional bits of a resampling weight.
constexpr int kResampleBits = 22;
// A weight w is stored as two digits, w = hi * 2^12 + lo with -2^11 <= lo < 2^11, so that 16-bit
// multiply-add instructions compute the exact 32-bit sum.
constexpr int kResampleDigitBits = 12;

// One axis of a resize: output o = sum over i < count[o] of weight[o][i] * input[first[o] + i].
struct ResampleAxis {
  int64_t n_in;
  int64_t n_out;
  int64_t taps;            // room for one output's weights; even, at least every count
  const int32_t* first;    // [n_out]
  const int32_t* count;    // [n_out], at least 1
  const int16_t* weights;  // [n_out, 2, taps]: hi digits, lo digits, both zero from count on
};

struct PreprocessTarget {
  ResampleAxis x, y;    // W -> columns*S, H -> rows*S
  bool vertical_first;  // the first pass is along y; only where both axes change
  int64_t columns;      // tiles beside each other
  uint8_t* mid;         // preprocess_mid_bytes: the picture between the passes
  void* out;            // [rows*columns, 3, S, S] contiguous
};

struct PreprocessParams {
  const uint8_t* image;  // [H, W, 3]; the bytes of a row are contiguous
  int64_t H, W;
  int64_t row_stride;  // bytes
  int64_t S;
  int64_t n_targets;
  PreprocessTarget targets[2];  // the grid and the thumbnail, or one of them
  const void* table;            // [3, 256] of dtype: the value of byte b in channel c
  DType dtype;                  // f32 or bf16
};

// Rows that a block works on together.
constexpr int64_t kPreprocessBand = 64;

constexpr int64_t preprocess_bands(int64_t rows) {
  return (rows + kPreprocessBand - 1) / kPreprocessBand;
}

// Blocks of the first stage: bands of source rows for the targets with the horizontal pass first,
// then each other target's bands of output rows.
constexpr int64_t preprocess_source_blocks(const PreprocessParams& p) {
  bool any = false;
  for (int64_t t = 0; t < p.n_targets; ++t) any |= !p.targets[t].vertical_first;
  return any ? preprocess_bands(p.H) : 0;
}
constexpr int64_t preprocess_first_blocks(const PreprocessParams& p) {
  int64_t n = preprocess_source_blocks(p);
  for (int64_t t = 0; t < p.n_targets; ++t) {
    if (p.targets[t].vertical_first) n += preprocess_bands(p.targets[t].y.n_out);
  }
  return n;
}
// Blocks of the second stage: each target's bands of output rows.
constexpr int64_t preprocess_second_blocks(const PreprocessParams& p) {
  int64_t n = 0;
  for (int64_t t = 0; t < p.n_targets; ++t) n += preprocess_bands(p.targets[t].y.n_out);
  return n;
}

// Bytes from row to row of the picture between the passes on a GPU: packed pixels where the first
// pass is along y, one channel's otherwise (kernels/cuda/preprocess.cuh).
constexpr int64_t preprocess_mid_pitch(const PreprocessTarget& t) {
  return ((t.vertical_first ? 3 * t.x.n_in : t.x.n_out) + 15) / 16 * 16;
}
// Vectors are read whole: room for padded rows, and 64 bytes of slack.
constexpr int64_t preprocess_mid_bytes(const PreprocessTarget& t) {
  return preprocess_mid_pitch(t) * (t.vertical_first ? t.y.n_out : 3 * t.y.n_in) + 64;
}
// Scratch of one call: a transposed band of the picture, and an output band where the horizontal
// pass is the second.
constexpr int64_t preprocess_scratch_bytes(const PreprocessParams& p) {
  int64_t width = 0;
  for (int64_t t = 0; t < p.n_targets; ++t) {
    if (p.targets[t].vertical_first && p.targets[t].x.n_out > width) width = p.targets[t].x.n_out;
  }
  return ((3 * p.W + 15) / 16 * 16 + 3 * width) * kPreprocessBand;
}

// Blocks [begin, end) of a stage. scratch is not shared with a call that runs at the same time.
IVR_CPU_KERNEL(preprocess_first, const PreprocessParams& p, int64_t begin, int64_t end,
               uint8_t* scratch)
IVR_CPU_KERNEL(preprocess_second, const PreprocessParams& p, int64_t begin, int64_t end,
               uint8_t* scratch)

}  // namespace ivr
