// A tensor in global memory and the box of it that one bulk tensor copy moves: what the host turns
// into a tensor map (tensor_map.h) and the emulator reads as it is.
#pragma once

#include <cstdint>

namespace ivr::cuda {

// How 16-byte chunks are permuted in shared memory: chunk index ^= row index, within rows of so
// many bytes, rows counted by the address. The numbers are those of matrix descriptors.
enum class Swizzle : int { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

struct TensorBox {
  static constexpr int kMaxRank = 4;
  const void* base;  // a multiple of 16 bytes
  int rank;          // 2 to 4
  // The contiguous dimension first.
  int64_t sizes[kMaxRank];    // elements
  int64_t strides[kMaxRank];  // bytes; the first is an element's size, the others multiples of 16
  int box[kMaxRank];          // elements, at most 256; the first in bytes: a multiple of 16
  Swizzle swizzle;            // the first of `box` in bytes is at most what is swizzled
};

}  // namespace ivr::cuda
