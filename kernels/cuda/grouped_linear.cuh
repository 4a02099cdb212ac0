// grouped_linear on the GPU (contract: kernels/grouped_linear.h; tiles: linear.cuh).
//
// Where an expert's rows begin is known on the device alone, so the grid has as many tiles of rows
// as any offsets can ask for, and a block looks up whose tile is its own: the experts that have
// rows, in order, take tiles of one list, the j-th of them from place offsets[e] / kM + j on. No
// two tiles share a place, and those that are left over leave at once.
//
// Bits       of a row: those of linear's kernel of the same phase (`rows` for decode, `tiles` else;
//            `plain` for f32) with that expert's weight, whatever tile it lies in.
// Checked    a row index out of range makes its row NaN; an expert whose rows do not lie within
//            0 .. M in order has none.
// Bytes      every used expert's N * K * size once, x and out as in linear.cuh, and offsets per
//            block.
#pragma once

#include <algorithm>

#include "kernels/cuda/linear.cuh"
#include "kernels/grouped_linear.h"

namespace ivr::cuda {

// ---- configuration ------------------------------------------------------------------------------

// Places in the list of tiles of `rows` rows: enough for any offsets.
inline int64_t expert_tiles(const GroupedLinearParams& g, int rows) {
  return g.M / rows + std::min(g.E, g.M);
}

// For a supported, non-empty g. What one cannot know, the rows of each expert, is taken as the
// mean over as many experts as may have any.
inline LinearConfig grouped_linear_config(const GroupedLinearParams& g) {
  const auto blocks = [](int64_t size, int64_t step) { return (size + step - 1) / step; };
  LinearParams whole{};
  whole.x = g.x;
  whole.weight = g.weight;
  whole.bias = g.bias;
  whole.out = g.out;
  whole.M = g.M;
  whole.N = g.N;
  whole.K = g.K;
  whole.x_m = g.x_r;
  whole.out_m = g.out_m;
  const bool aligned = linear_aligned(whole) && g.bias_e % 2 == 0;
  const int64_t experts = std::min(g.E, g.M), mean = blocks(g.M, experts);
  LinearConfig c{LinearKernel::plain, kPlainM, kPlainN, false, kPlainThreads, 0, 0, 0};
  if (g.dtype == DType::bf16 && g.decode) {
    c = {LinearKernel::rows, 16, 8, aligned, kLinearRowsWarps * kWarpSize, 0, 0, 0};
    if (aligned && mean > 16) c.m = 64;
    if (aligned && g.N * experts >= kLinearWideN) c.n = 32;
  } else if (g.dtype == DType::bf16) {
    const bool wide =
        aligned && mean > 64 && experts * blocks(mean, 128) * blocks(g.N, 128) >= kLinearFewTiles;
    c = linear_tiles_config(wide ? 128 : 64, aligned);
  }
  c.blocks_m = static_cast<unsigned>(expert_tiles(g, c.m));
  c.blocks_n = static_cast<unsigned>(blocks(g.N, c.n));
  return c;
}

inline bool grouped_linear_supported(const GroupedLinearParams& g) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  if (g.dtype != DType::f32 && g.dtype != DType::bf16) return false;
  // The grid's second dimension, in the least rows a block.
  return expert_tiles(g, 16) <= 65535 && g.R <= kMax && g.N <= kMax && g.K <= kMax && g.E <= kMax;
}

// ---- device -------------------------------------------------------------------------------------

// Row m takes row rows[m]; without rows, row m.
struct GatheredRows {
  const int32_t* rows;
  int end;    // rows at or behind it do not exist
  int count;  // of x

  template <int kCount>
  struct Picked {
    static constexpr int kNone = -1, kBad = -2;
    int at[kCount];
    IVR_DEVICE SourceRow operator()(int t) const {
      return {at[t], at[t] >= 0, at[t] == kBad ? __uint_as_float(0x7fc00000u) : 0.0f};
    }
  };
  template <int kCount>
  IVR_DEVICE Picked<kCount> pick(int first, int step) const {
    using Result = Picked<kCount>;
    Result picked;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      const int m = first + t * step;
      int at = m < end ? m : Result::kNone;
      if (at >= 0 && rows != nullptr) at = load_raw<int32_t>(rows + m);
      picked.at[t] = m >= end || (at >= 0 && at < count) ? at : Result::kBad;
    }
    return picked;
  }
};

struct ExpertTile {
  int expert;      // -1: the place has no tile
  int first, end;  // rows first to first + kM, below end
};

// The tile of kM rows at a place of the list. Every warp finds it by itself.
template <int kM>
IVR_DEVICE ExpertTile find_expert_tile(const GroupedLinearParams& g, int place) {
  // As many loads at once cover the experts of published models.
  constexpr int kBatch = 4;
  const int lane = threadIdx.x % kWarpSize;
  const int E = static_cast<int>(g.E), M = static_cast<int>(g.M);
  ExpertTile found{-1, 0, 0};
  int used = 0;  // experts before these that have rows
  for (int first = 0; first < E; first += kBatch * kWarpSize) {
    int begin[kBatch], end[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = first + i * kWarpSize + lane;
      begin[i] = e < E ? load_raw<int32_t>(g.offsets + e) : 0;
      end[i] = e < E ? load_raw<int32_t>(g.offsets + e + 1) : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool has_rows = 0 <= begin[i] && begin[i] < end[i] && end[i] <= M;
      const uint32_t mask = __ballot_sync(kFullMask, has_rows);
      const int start = begin[i] / kM + used + count_bits(mask & ((1u << lane) - 1));
      const uint32_t reached = __ballot_sync(kFullMask, has_rows && start <= place);
      if (reached != 0) {
        const int last = highest_bit(reached);
        found.expert = first + i * kWarpSize + last;
        found.first = __shfl_sync(kFullMask, begin[i] + (place - start) * kM, last);
        found.end = __shfl_sync(kFullMask, end[i], last);
      }
      used += count_bits(mask);
    }
  }
  if (found.first >= found.end) found.expert = -1;
  return found;
}

// What a block does; the kernel's whole body, also under emulation.
template <LinearKernel kKernel, int kM, int kN, bool kAligned>
IVR_DEVICE void grouped_linear_block(const GroupedLinearParams& g) {
  using Element = std::conditional_t<kKernel == LinearKernel::plain, float, bf16>;
  const ExpertTile tile = find_expert_tile<kM>(g, static_cast<int>(blockIdx.y));
  if (tile.expert < 0) return;
  LinearParams p{};
  p.x = g.x;
  p.weight = static_cast<const Element*>(g.weight) + tile.expert * (g.N * g.K);
  if (g.bias != nullptr) p.bias = static_cast<const Element*>(g.bias) + tile.expert * g.bias_e;
  p.out = g.out;
  p.M = tile.end;
  p.N = g.N;
  p.K = g.K;
  p.x_m = g.x_r;
  p.out_m = g.out_m;
  p.dtype = p.out_dtype = kKernel == LinearKernel::plain ? DType::f32 : DType::bf16;
  linear_tile<kKernel, kM, kN, kAligned>(p, tile.first, static_cast<int>(blockIdx.x) * kN,
                                         GatheredRows{g.rows, tile.end, static_cast<int>(g.R)});
}

}  // namespace ivr::cuda
