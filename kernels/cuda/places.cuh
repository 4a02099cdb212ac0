// Floats and where they stand as integers that order alike, for the largest of many.
#pragma once

#include "kernels/cuda/prim.cuh"

namespace ivr::cuda {

// Orders like the floats: larger float, larger key.
IVR_DEVICE uint32_t key_of(float x) {
  const uint32_t u = __float_as_uint(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
IVR_DEVICE float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A value and its index: the larger value first, then the lower index. -0 counts as 0. Never 0, but
// for a NaN with its sign set.
IVR_DEVICE uint64_t place_of(float x, int index) {
  return uint64_t{key_of(x + 0.0f)} << 32 | ~static_cast<uint32_t>(index);
}
IVR_DEVICE float value_at(uint64_t place) { return value_of(static_cast<uint32_t>(place >> 32)); }
IVR_DEVICE int index_at(uint64_t place) { return static_cast<int>(~static_cast<uint32_t>(place)); }

}  // namespace ivr::cuda
