// linear on the GPU (contract: kernels/linear.h). The weight is plain: [N, K], row by row.
//
// Three kernels:
//   rows    decode, bf16, any M: a block of 8 warps takes 8 or 32 columns and 16 or 64 rows; its
//           warps take blocks of 32 k in turn, straight from global memory into tensor core
//           fragments (16 bytes a lane, no shared memory), and their sums are added in order.
//   tiles   prefill, bf16: 128x128 or 64x64 outputs a block, 64 k a step, three stages of
//           asynchronous copies, ldmatrix and mma.sync.
//   plain   f32: 32x64 outputs a block, multiply-adds; pieces of 128 k are added in order.
//
// Bits       an element is one sum over k whose order depends on the kernel and on K alone: neither
//            M, nor the shape of a tile, nor alignment changes a row's bits. `rows` and `tiles`
//            differ in the order, so the caller says which (p.decode), and not M.
// Alignment  decides how operands are fetched: 16 bytes at once, else element by element.
// Bytes      rows: N * K * 2 + M * (K * N / 32 + N) * 2, x from L2;
//            tiles: (N * K * ceil(M / 128) + M * K * ceil(N / 128) + M * N) * 2, mostly from L2.
#pragma once

#include <cstdio>
#include <limits>

#include "kernels/cuda/tiles.cuh"
#include "kernels/linear.h"

namespace ivr::cuda {

// ---- configuration ------------------------------------------------------------------------------

enum class LinearKernel { rows, tiles, plain };

struct LinearConfig {
  LinearKernel kernel;
  int m, n;      // outputs of a block
  bool aligned;  // every operand can be fetched in vectors
  int threads;
  size_t shared_bytes;
  unsigned blocks_m, blocks_n;
};

constexpr int kLinearRowsWarps = 8;
constexpr int kLinearDepth = 64;  // k per stage of the tiles kernel
constexpr int kLinearStages = 3;
constexpr int kPlainM = 32, kPlainN = 64, kPlainDepth = 16, kPlainThreads = 128;
// One chain of additions over a K of thousands costs more accuracy than float32 models allow.
constexpr int kPlainPiece = 128;

// From here on a block of the rows kernel takes 32 columns: x is fetched less often, and there are
// enough blocks all the same.
constexpr int64_t kLinearWideN = 4096;
// Fewer 128x128 tiles than this leave multiprocessors idle: 64x64 then.
constexpr int64_t kLinearFewTiles = 128;

inline bool linear_supported(const LinearParams& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  constexpr int64_t kMaxRows =
      65535 * 16;  // the grid's second dimension, in the least rows a block
  if (p.dtype != DType::f32 && p.dtype != DType::bf16) return false;
  if (is_gated(p.activation)) return false;
  return p.M <= kMaxRows && p.N <= kMax && p.K <= kMax;
}

inline bool linear_aligned(const LinearParams& p) {
  const auto at = [](const void* base, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(base) % bytes == 0;
  };
  const bool pairs = p.N % 2 == 0 && at(p.out, 8) && at(p.residual, 8) && at(p.bias, 4) &&
                     at(p.scale, 4) && p.out_m % 2 == 0 && p.residual_m % 2 == 0;
  return p.K % 8 == 0 && p.x_m % 8 == 0 && at(p.x, 16) && at(p.weight, 16) && pairs;
}

// Of the tiles kernel; the grid is the caller's.
inline LinearConfig linear_tiles_config(int side, bool aligned) {
  return {.kernel = LinearKernel::tiles,
          .m = side,
          .n = side,
          .aligned = aligned,
          .threads = side == 128 ? 256 : 128,
          .shared_bytes = size_t{4} * kLinearStages * kLinearDepth * static_cast<size_t>(side),
          .blocks_m = 0,
          .blocks_n = 0};
}

inline LinearConfig linear_config(const LinearParams& p) {
  const auto blocks = [](int64_t size, int64_t step) { return (size + step - 1) / step; };
  LinearConfig c{LinearKernel::plain, kPlainM, kPlainN, false, kPlainThreads, 0, 0, 0};
  if (p.dtype == DType::bf16) {
    c.aligned = linear_aligned(p);
    if (p.decode) {
      c.kernel = LinearKernel::rows;
      c.m = c.aligned && p.M > 16 ? 64 : 16;
      c.n = c.aligned && p.N >= kLinearWideN ? 32 : 8;
      c.threads = kLinearRowsWarps * kWarpSize;
    } else {
      const bool wide = c.aligned && blocks(p.M, 128) * blocks(p.N, 128) >= kLinearFewTiles;
      c = linear_tiles_config(wide ? 128 : 64, c.aligned);
    }
  }
  c.blocks_m = static_cast<unsigned>(blocks(p.M, c.m));
  c.blocks_n = static_cast<unsigned>(blocks(p.N, c.n));
  return c;
}

// `rows 16x8 aligned=1 grid=112x1`; returns what snprintf returns.
inline int format(const LinearConfig& c, char* out, size_t size) {
  constexpr const char* kNames[] = {"rows", "tiles", "plain"};
  return std::snprintf(out, size, "%s %dx%d aligned=%d grid=%ux%u",
                       kNames[static_cast<int>(c.kernel)], c.m, c.n, static_cast<int>(c.aligned),
                       c.blocks_n, c.blocks_m);
}

// Returns f.template operator()<kKernel, kM, kN, kAligned>() for the kernel that c names.
template <typename F>
auto with_linear_kernel(const LinearConfig& c, F&& f) {
  constexpr auto kRows = LinearKernel::rows, kTiles = LinearKernel::tiles;
  if (c.kernel == LinearKernel::plain) {
    return f.template operator()<LinearKernel::plain, kPlainM, kPlainN, false>();
  }
  if (c.kernel == kTiles) {
    if (!c.aligned) return f.template operator()<kTiles, 64, 64, false>();
    return c.m == 128 ? f.template operator()<kTiles, 128, 128, true>()
                      : f.template operator()<kTiles, 64, 64, true>();
  }
  if (!c.aligned) return f.template operator()<kRows, 16, 8, false>();
  if (c.m == 16) {
    return c.n == 8 ? f.template operator()<kRows, 16, 8, true>()
                    : f.template operator()<kRows, 16, 32, true>();
  }
  return c.n == 8 ? f.template operator()<kRows, 64, 8, true>()
                  : f.template operator()<kRows, 64, 32, true>();
}

// ---- epilogue -----------------------------------------------------------------------------------

IVR_DEVICE float activate(float v, Activation activation) {
  if (activation == Activation::gelu) return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
  if (activation == Activation::silu) return v / (1.0f + expf(-v));
  return v;
}

// Products are rounded before they are added, so that every kernel rounds alike.
IVR_DEVICE float finish(const LinearParams& p, float v, float bias, float scale, float residual) {
  if (p.bias != nullptr) v += bias;
  v = activate(v, p.activation);
  if (p.scale != nullptr) v = multiply_rounded(v, scale);
  return p.residual != nullptr ? residual + v : v;
}

IVR_DEVICE void store_element(const LinearParams& p, int m, int n, float v) {
  const bool in_fp32 = p.dtype == DType::f32, out_fp32 = p.out_dtype == DType::f32;
  const float bias = p.bias != nullptr ? load_float(p.bias, n, in_fp32) : 0.0f;
  const float scale = p.scale != nullptr ? load_float(p.scale, n, in_fp32) : 0.0f;
  const float residual =
      p.residual != nullptr ? load_float(p.residual, m * p.residual_m + n, out_fp32) : 0.0f;
  store_float(p.out, m * p.out_m + n, finish(p, v, bias, scale, residual), out_fp32);
}

// Columns n and n + 1 of aligned bf16 operands; n is even.
IVR_DEVICE void store_pair(const LinearParams& p, int m, int n, float v0, float v1) {
  const bool out_fp32 = p.out_dtype == DType::f32;
  float bias[2] = {}, scale[2] = {}, residual[2] = {};
  if (p.bias != nullptr) load_pair(p.bias, n, false, bias);
  if (p.scale != nullptr) load_pair(p.scale, n, false, scale);
  if (p.residual != nullptr) load_pair(p.residual, m * p.residual_m + n, out_fp32, residual);
  store_pair(p.out, m * p.out_m + n, out_fp32, finish(p, v0, bias[0], scale[0], residual[0]),
             finish(p, v1, bias[1], scale[1], residual[1]));
}

// ---- rows of x ----------------------------------------------------------------------------------

// The row of x that a row of the output takes.
struct SourceRow {
  int at;
  bool exists;
  float start;  // of its sums: 0, or NaN where a row was asked for that does not exist
};

// Row m takes row m. Like every Rows of linear_tile: pick<kCount>(first, step)(t) is the source of
// row first + t * step.
struct OwnRows {
  int end;  // rows at or behind it do not exist

  struct Picked {
    int first, step, end;
    IVR_DEVICE SourceRow operator()(int t) const {
      const int m = first + t * step;
      return {m, m < end, 0.0f};
    }
  };
  template <int kCount>
  IVR_DEVICE Picked pick(int first, int step) const {
    return {first, step, end};
  }
};

// The sums of a warp's fragments (prim.cuh); sources: of its rows 8 t + lane / 4.
template <int kTilesM, int kTilesN, typename Sources>
IVR_DEVICE void start_sums(const Sources& sources, float (&sum)[kTilesM][kTilesN][4]) {
#pragma unroll
  for (int tm = 0; tm < kTilesM; ++tm) {
#pragma unroll
    for (int tn = 0; tn < kTilesN; ++tn) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[tm][tn][e] = sources(2 * tm + e / 2).start;
    }
  }
}

// ---- rows: few rows, the weight streams by ------------------------------------------------------

// Eight elements at k of a row of K; zeros where the row or k does not exist. kOnce: nobody else
// reads them.
template <bool kAligned, bool kOnce>
IVR_DEVICE Vec<bf16> load_depth(const bf16* row, bool exists, int k, int K) {
  if constexpr (!kAligned) return load_elements(row + k, exists ? K - k : 0);
  Vec<bf16> v{};
  if (exists && k < K) v = kOnce ? load16_once(row + k) : load16(row + k);
  return v;
}

// The k of a fragment are shuffled, in x and the weight alike: lane j of a row takes 8j to 8j + 7
// of a block of 32, of which the first half are its k in one mma.sync and the second half in the
// next.
template <int kM, int kN, bool kAligned, typename Rows>
IVR_DEVICE void linear_rows_tile(const LinearParams& p, int m0, int n0, const Rows& rows) {
  constexpr int kTilesM = kM / 16, kTilesN = kN / 8, kDepth = 32;
  // Blocks of k on their way at once, within the registers of two blocks of threads per SM.
  constexpr int kBatch = kTilesM * kTilesN >= 16 ? 1 : kTilesM * kTilesN >= 4 ? 2 : 4;
  IVR_SHARED(float, sums, kLinearRowsWarps * 16 * kN);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), K = static_cast<int>(p.K);
  const auto* x = static_cast<const bf16*>(p.x);
  const auto* weight = static_cast<const bf16*>(p.weight);

  const auto sources = rows.template pick<2 * kTilesM>(m0 + lane / 4, 8);
  float sum[kTilesM][kTilesN][4];
  start_sums(sources, sum);
  for (int first = warp * kDepth; first < K; first += kLinearRowsWarps * kDepth * kBatch) {
    Vec<bf16> w[kBatch][kTilesN], a[kBatch][kTilesM][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = first + i * kLinearRowsWarps * kDepth + lane % 4 * 8;
#pragma unroll
      for (int t = 0; t < kTilesN; ++t) {
        const int n = n0 + t * 8 + lane / 4;
        w[i][t] = load_depth<kAligned, true>(weight + n * p.K, n < N, k, K);
      }
#pragma unroll
      for (int t = 0; t < kTilesM * 2; ++t) {
        const SourceRow row = sources(t);
        a[i][t / 2][t % 2] = load_depth<kAligned, false>(x + row.at * p.x_m, row.exists, k, K);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int tm = 0; tm < kTilesM; ++tm) {
#pragma unroll
        for (int tn = 0; tn < kTilesN; ++tn) {
          const uint32_t* low = a[i][tm][0].words;
          const uint32_t* high = a[i][tm][1].words;
          const uint32_t* b = w[i][tn].words;
          mma(sum[tm][tn], {low[0], high[0], low[1], high[1]}, {b[0], b[1]});
          mma(sum[tm][tn], {low[2], high[2], low[3], high[3]}, {b[2], b[3]});
        }
      }
    }
  }

#pragma unroll
  for (int tm = 0; tm < kTilesM; ++tm) {
    if (tm > 0) __syncthreads();
#pragma unroll
    for (int tn = 0; tn < kTilesN; ++tn) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = tn * 8 + lane % 4 * 2 + e % 2;
        sums[(warp * 16 + row) * kN + column] = sum[tm][tn][e];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * kN; i += kLinearRowsWarps * kWarpSize) {
      const int m = m0 + tm * 16 + i / kN, n = n0 + i % kN;
      if (m >= M || n >= N) continue;
      float v = 0.0f;
#pragma unroll
      for (int w = 0; w < kLinearRowsWarps; ++w) v += sums[w * 16 * kN + i];
      store_element(p, m, n, v);
    }
  }
}

// ---- tiles --------------------------------------------------------------------------------------

// Asks for kRows rows and k to k + 64 of each, by kThreads threads; sources: of this thread's rows.
template <int kRows, int kThreads, bool kAligned, typename Sources>
IVR_DEVICE void load_stage(const bf16* base, int64_t stride, const Sources& sources, int k, int K,
                           Shared<bf16> tile) {
  constexpr int kChunks = kLinearDepth / 8;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = threadIdx.x + i * kThreads, row = at / kChunks, chunk = at % kChunks;
    const int depth = k + chunk * 8;
    const SourceRow source = sources(i);
    const bool exists = source.exists && depth < K;
    const bf16* from = base + (exists ? source.at * stride + depth : 0);
    const Shared<bf16> to = tile + tile_offset<kLinearDepth>(row, chunk);
    if constexpr (kAligned) {
      copy16_async(to, from, exists);
    } else {
      store16_shared(to, load_elements(from, exists ? K - depth : 0));
    }
  }
}

template <int kM, int kN, bool kAligned, typename Rows>
IVR_DEVICE void linear_tiles_tile(const LinearParams& p, int m0, int n0, const Rows& rows) {
  // A warp's part, and how many warps stand side by side.
  constexpr int kWarpM = kM / 2, kWarpN = 32, kWarpsN = kN / kWarpN;
  constexpr int kThreads = 2 * kWarpsN * kWarpSize;
  constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8, kStage = (kM + kN) * kLinearDepth;
  IVR_DYNAMIC_SHARED(bf16, stages);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), K = static_cast<int>(p.K);
  const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;
  const int steps = (K + kLinearDepth - 1) / kLinearDepth;

  // The rows of a stage that this thread copies.
  constexpr int kChunks = kLinearDepth / 8, kStep = kThreads / kChunks;
  const int copied = static_cast<int>(threadIdx.x) / kChunks;
  const auto x_rows = rows.template pick<kM / kStep>(m0 + copied, kStep);
  const auto weight_rows = OwnRows{N}.pick<kN / kStep>(n0 + copied, kStep);
  // Every step makes a group, an empty one behind the last stage: the waits count groups.
  const auto ask = [&](int step) {
    if (step < steps) {
      const Shared<bf16> to = stages + step % kLinearStages * kStage;
      load_stage<kM, kThreads, kAligned>(static_cast<const bf16*>(p.x), p.x_m, x_rows,
                                         step * kLinearDepth, K, to);
      load_stage<kN, kThreads, kAligned>(static_cast<const bf16*>(p.weight), p.K, weight_rows,
                                         step * kLinearDepth, K, to + kM * kLinearDepth);
    }
    commit_copies();
  };

  float sum[kTilesM][kTilesN][4];
  start_sums(rows.template pick<2 * kTilesM>(m0 + warp_m + lane / 4, 8), sum);
#pragma unroll
  for (int step = 0; step < kLinearStages - 1; ++step) ask(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kLinearStages - 2>();
    __syncthreads();
    ask(step + kLinearStages - 1);
    const Shared<bf16> a_tile = stages + step % kLinearStages * kStage;
    const Shared<bf16> b_tile = a_tile + kM * kLinearDepth;
#pragma unroll
    for (int k = 0; k < kLinearDepth / 16; ++k) {
      uint32_t a[kTilesM][4], b[kTilesN / 2][4];
#pragma unroll
      for (int t = 0; t < kTilesM; ++t) load_a<kLinearDepth>(a[t], a_tile, warp_m + t * 16, k);
#pragma unroll
      for (int t = 0; t < kTilesN / 2; ++t) {
        load_b<kLinearDepth>(b[t], b_tile, warp_n + t * 16, k);
      }
#pragma unroll
      for (int tm = 0; tm < kTilesM; ++tm) {
#pragma unroll
        for (int tn = 0; tn < kTilesN; ++tn) {
          mma(sum[tm][tn], a[tm], {b[tn / 2][tn % 2 * 2], b[tn / 2][tn % 2 * 2 + 1]});
        }
      }
    }
  }

#pragma unroll
  for (int tm = 0; tm < kTilesM; ++tm) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = m0 + warp_m + tm * 16 + h * 8 + lane / 4;
#pragma unroll
      for (int tn = 0; tn < kTilesN; ++tn) {
        const int n = n0 + warp_n + tn * 8 + lane % 4 * 2;
        const float v0 = sum[tm][tn][2 * h], v1 = sum[tm][tn][2 * h + 1];
        if (m >= M) continue;
        if constexpr (kAligned) {
          if (n < N) store_pair(p, m, n, v0, v1);
        } else {
          if (n < N) store_element(p, m, n, v0);
          if (n + 1 < N) store_element(p, m, n + 1, v1);
        }
      }
    }
  }
}

// ---- plain: f32 ---------------------------------------------------------------------------------

// kCount consecutive k of one row into column `row` of a tile [kPlainDepth][kStride].
template <int kCount, int kStride>
IVR_DEVICE void stage_transposed(const float* from, bool exists, int k, int K, Shared<float> tile,
                                 int depth, int row) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool there = exists && k + depth + i < K;
    tile[(depth + i) * kStride + row] = there ? load_float(from, k + depth + i, true) : 0.0f;
  }
}

template <typename Rows>
IVR_DEVICE void linear_plain_tile(const LinearParams& p, int m0, int n0, const Rows& rows) {
  constexpr int kStrideM = kPlainM + 4, kStrideN = kPlainN + 4;
  IVR_SHARED(float, a_tile, kPlainDepth* kStrideM);
  IVR_SHARED(float, b_tile, kPlainDepth* kStrideN);
  const int thread = threadIdx.x;
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), K = static_cast<int>(p.K);
  const int row = thread / 16 * 4, column = thread % 16 * 4;
  // What this thread stages.
  const SourceRow staged = rows.template pick<1>(m0 + thread / 4, 0)(0);
  const int n = n0 + thread / 2;
  const float* x = static_cast<const float*>(p.x) + staged.at * p.x_m;
  const float* weight = static_cast<const float*>(p.weight) + n * p.K;

  const auto sources = rows.template pick<4>(m0 + row, 1);
  float sum[4][4], piece[4][4] = {};
#pragma unroll
  for (int e = 0; e < 16; ++e) sum[e / 4][e % 4] = sources(e / 4).start;
  const auto add_piece = [&] {
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      sum[e / 4][e % 4] += piece[e / 4][e % 4];
      piece[e / 4][e % 4] = 0.0f;
    }
  };
  for (int k = 0; k < K; k += kPlainDepth) {
    if (k > 0) __syncthreads();
    if (k % kPlainPiece == 0) add_piece();
    stage_transposed<4, kStrideM>(x, staged.exists, k, K, a_tile, thread % 4 * 4, thread / 4);
    stage_transposed<8, kStrideN>(weight, n < N, k, K, b_tile, thread % 2 * 8, thread / 2);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPlainDepth; ++i) {
      float a[4], b[4];
      unpack(load16_shared(a_tile + i * kStrideM + row), a);
      unpack(load16_shared(b_tile + i * kStrideN + column), b);
#pragma unroll
      for (int e = 0; e < 16; ++e) piece[e / 4][e % 4] += a[e / 4] * b[e % 4];
    }
  }
  add_piece();
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int i = m0 + row + e / 4, j = n0 + column + e % 4;
    if (i < M && j < N) store_element(p, i, j, sum[e / 4][e % 4]);
  }
}

// Rows m0 to m0 + kM below p.M, columns n0 to n0 + kN, by a whole block.
template <LinearKernel kKernel, int kM, int kN, bool kAligned, typename Rows>
IVR_DEVICE void linear_tile(const LinearParams& p, int m0, int n0, const Rows& rows) {
  if constexpr (kKernel == LinearKernel::rows) {
    linear_rows_tile<kM, kN, kAligned>(p, m0, n0, rows);
  } else if constexpr (kKernel == LinearKernel::tiles) {
    linear_tiles_tile<kM, kN, kAligned>(p, m0, n0, rows);
  } else {
    linear_plain_tile(p, m0, n0, rows);
  }
}

template <LinearKernel kKernel, int kM, int kN, bool kAligned>
IVR_DEVICE void linear_block(const LinearParams& p) {
  linear_tile<kKernel, kM, kN, kAligned>(p, static_cast<int>(blockIdx.y) * kM,
                                         static_cast<int>(blockIdx.x) * kN,
                                         OwnRows{static_cast<int>(p.M)});
}

}  // namespace ivr::cuda
