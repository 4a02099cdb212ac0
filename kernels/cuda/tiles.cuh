// Tiles of bf16 in shared memory and the tensor core fragments that are read from them.
//
// A tile's rows are kWidth elements, cut into chunks of 8 (16 bytes). Chunks are swizzled: those of
// one column in eight neighbouring rows lie on different banks, so that ldmatrix and the copies
// that fill the tile meet no conflict.
#pragma once

#include "kernels/cuda/prim.cuh"

namespace ivr::cuda {

template <int kWidth>
IVR_DEVICE int tile_offset(int row, int chunk) {
  static_assert(kWidth % 64 == 0);
  return row * kWidth + (chunk ^ (row & 7)) * 8;
}

// Rows [row, row + 16), columns [16 k, 16 k + 16): an a fragment (prim.cuh).
template <int kWidth>
IVR_DEVICE void load_a(uint32_t (&a)[4], Shared<bf16> tile, int row, int k) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrices<false>(a, tile + tile_offset<kWidth>(row + lane % 16, 2 * k + lane / 16));
}

// The same rows and columns as two b fragments whose k are the tile's columns: b[0], b[1] for rows
// 0 to 7, b[2], b[3] for rows 8 to 15.
template <int kWidth>
IVR_DEVICE void load_b(uint32_t (&b)[4], Shared<bf16> tile, int row, int k) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrices<false>(
      b, tile + tile_offset<kWidth>(row + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}

// Two b fragments whose k are the tile's rows [row, row + 16), for columns [16 n, 16 n + 8) and
// [16 n + 8, 16 n + 16).
template <int kWidth>
IVR_DEVICE void load_b_transposed(uint32_t (&b)[4], Shared<bf16> tile, int row, int n) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrices<true>(b, tile + tile_offset<kWidth>(row + lane % 16, 2 * n + lane / 16));
}

}  // namespace ivr::cuda
