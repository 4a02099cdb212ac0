// From accumulators to the output: the epilogue of the matrix products of Hopper, on what a warp
// holds. A product of mma.sync leaves its sums in the same places, so that the emulator runs this.
//
// Layout     of a row's columns in blocks of 8, lane l of the row's four has 2 l and 2 l + 1 of
//            every block, in v[block].
// Memory     four blocks at a time change hands between the four lanes: each then has the 16 bytes
//            of one block, and a warp's store covers 64 bytes of 8 rows.
#pragma once

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/linear.cuh"

namespace ivr::cuda {

// Between the four lanes of a row: w[i] of lane j becomes w[j] of lane i.
IVR_DEVICE void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      uint32_t& low = w[i];
      uint32_t& high = w[i + step];
      const uint32_t other = __shfl_xor_sync(kFullMask, upper ? low : high, step);
      (upper ? low : high) = other;
    }
  }
}

// What is fixed in a kernel, so that the compiler leaves out the rest.
template <GemmEpilogue kEpilogue>
IVR_DEVICE float finish_gemm(const LinearParams& p, float v, float bias, float scale,
                             float residual) {
  LinearParams known = p;
  known.activation = kEpilogue == GemmEpilogue::gelu ? Activation::gelu : Activation::none;
  if constexpr (kEpilogue != GemmEpilogue::residual) known.scale = known.residual = nullptr;
  return finish(known, v, bias, scale, residual);
}

IVR_DEVICE void load_pair_if(const void* base, int64_t i, bool exists, float (&f)[2]) {
  f[0] = f[1] = 0.0f;
  if (base != nullptr && exists) load_pair(base, i, false, f);
}

// Rows m[r], columns n to n + 32 of the weight's rows, for the lanes of a warp together. n and the
// width are multiples of 8.
template <GemmEpilogue kEpilogue, int kRows>
IVR_DEVICE void store_blocks(const LinearParams& p, const int (&m)[kRows], int n,
                             const float (&v)[kRows][4][2]) {
  const int lane = threadIdx.x % 4, N = static_cast<int>(p.N);
  const int mine = n + lane * 8;  // the block that this lane stores
  float bias[4][2], scale[4][2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    load_pair_if(p.bias, n + j * 8 + lane * 2, n + j * 8 < N, bias[j]);
    load_pair_if(kEpilogue == GemmEpilogue::residual ? p.scale : nullptr, n + j * 8 + lane * 2,
                 n + j * 8 < N, scale[j]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool exists = m[r] < p.M && mine < N;
    Vec<bf16> residual{}, out;
    if constexpr (kEpilogue == GemmEpilogue::residual) {
      const auto* from = static_cast<const bf16*>(p.residual);
      if (exists) residual = load16(from + m[r] * p.residual_m + mine);
      transpose_quad(residual.words);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float r0 = low_half_to_float(residual.words[j]);
      const float r1 = high_half_to_float(residual.words[j]);
      out.words[j] = pack_bf16(finish_gemm<kEpilogue>(p, v[r][j][0], bias[j][0], scale[j][0], r0),
                               finish_gemm<kEpilogue>(p, v[r][j][1], bias[j][1], scale[j][1], r1));
    }
    transpose_quad(out.words);
    if (exists) store16(static_cast<bf16*>(p.out) + m[r] * p.out_m + mine, out);
  }
}

// The same for gate and up, whose blocks take turns: of each, columns n to n + 32 of out.
template <int kRows>
IVR_DEVICE void store_gated_blocks(const LinearParams& p, const int (&m)[kRows], int n,
                                   const float (&v)[kRows][8][2]) {
  const int lane = threadIdx.x % 4, width = static_cast<int>(p.N / 2);
  const int mine = n + lane * 8;
  float gate[4][2], up[4][2];  // their biases
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = n + j * 8 + lane * 2;
    load_pair_if(p.bias, column, n + j * 8 < width, gate[j]);
    load_pair_if(p.bias, width + column, n + j * 8 < width, up[j]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Vec<bf16> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        y[e] = activate(v[r][2 * j][e] + gate[j][e], Activation::silu) *
               (v[r][2 * j + 1][e] + up[j][e]);
      }
      out.words[j] = pack_bf16(y[0], y[1]);
    }
    transpose_quad(out.words);
    if (m[r] < p.M && mine < width) {
      store16(static_cast<bf16*>(p.out) + m[r] * p.out_m + mine, out);
    }
  }
}

// The tile that begins at (m0, n0) of the product, by all threads that have sums of it; sum(i) is
// this thread's i-th (gemm.h).
template <GemmEpilogue kEpilogue, int kN, typename F>
IVR_DEVICE void store_tile(const LinearParams& p, int m0, int n0, int thread, F&& sum) {
  constexpr bool kGated = kEpilogue == GemmEpilogue::swiglu;
  constexpr int kBlocks = kGated ? 8 : 4;  // at a time
  constexpr int kRows = 2 * 2 * kGemmM / gemm_threads(kN);
  int m[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) m[r] = m0 + gemm_row(kN, thread, r / 2 * (kN / 2) + r % 2 * 2);
#pragma unroll
  for (int first = 0; first < kN / 8; first += kBlocks) {
    float v[kRows][kBlocks][2];
#pragma unroll
    for (int i = 0; i < kRows * kBlocks * 2; ++i) {
      const int r = i / (kBlocks * 2), j = i / 2 % kBlocks, e = i % 2;
      v[r][j][e] = sum(r / 2 * (kN / 2) + 4 * (first + j) + r % 2 * 2 + e);
    }
    if constexpr (kGated) {
      store_gated_blocks<kRows>(p, m, (n0 + first * 8) / 2, v);
    } else {
      store_blocks<kEpilogue, kRows>(p, m, n0 + first * 8, v);
    }
  }
}

}  // namespace ivr::cuda
