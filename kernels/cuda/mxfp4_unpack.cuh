// mxfp4_unpack on the GPU (contract: kernels/mxfp4_unpack.h).
//
// Mapping    a thread makes vectors of eight elements, 16 bytes, out of 4 bytes of a block and its
//            scale; neighbours take neighbouring vectors.
// Bytes      17 + 64 per block.
#pragma once

#include "kernels/cuda/rows.cuh"
#include "kernels/mxfp4_unpack.h"

namespace ivr::cuda {

constexpr int kMxfp4Threads = 256;
// Vectors of a thread, their bytes asked for before the first is made.
constexpr int kMxfp4Batch = 4;
constexpr int kMxfp4Vectors = kMxfp4Block / Vec<bf16>::kSize;  // of a block

struct Mxfp4Config {
  bool aligned;  // codes can be fetched in words, and elements written in vectors
  int64_t blocks;
};

inline Mxfp4Config mxfp4_unpack_config(const Mxfp4Params& p) {
  constexpr int64_t kStep = kMxfp4Threads * kMxfp4Batch / kMxfp4Vectors;
  return {reinterpret_cast<uintptr_t>(p.blocks) % 4 == 0 && pointer_aligned(p.out),
          (p.B + kStep - 1) / kStep};
}

inline bool mxfp4_unpack_supported(const Mxfp4Params& p) {
  return mxfp4_unpack_config(p).blocks <= kMaxIndex;
}

// `aligned=1 grid=8`; returns what snprintf returns.
inline int format(const Mxfp4Config& c, char* out, size_t size) {
  return std::snprintf(out, size, "aligned=%d grid=%lld", static_cast<int>(c.aligned),
                       static_cast<long long>(c.blocks));
}

template <typename F>
void with_mxfp4_kernel(const Mxfp4Config& c, F&& f) {
  c.aligned ? f.template operator()<true>() : f.template operator()<false>();
}

// 2^(scale - 127); NaN for 255.
IVR_DEVICE float mxfp4_factor(uint32_t scale) {
  if (scale == 255) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(scale == 0 ? 0x00400000u : scale << 23);
}

// The bits of an element, put where a float has its own, are the element times 2^-126.
IVR_DEVICE float mxfp4_element(uint32_t code) {
  return __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
}

template <bool kAligned>
IVR_DEVICE uint32_t load_codes(const uint8_t* p) {
  if constexpr (kAligned) return load_raw<uint32_t>(p);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= static_cast<uint32_t>(load_raw<uint8_t>(p + i)) << 8 * i;
  return codes;
}

// What a block does; the kernel's whole body, also under emulation.
template <bool kAligned>
IVR_DEVICE void mxfp4_unpack_block(const Mxfp4Params& p) {
  constexpr int kSize = Vec<bf16>::kSize;
  const int64_t first = int64_t{blockIdx.x} * kMxfp4Threads * kMxfp4Batch + threadIdx.x;
  const int64_t vectors = p.B * kMxfp4Vectors;
  uint32_t codes[kMxfp4Batch] = {}, scales[kMxfp4Batch] = {};
#pragma unroll
  for (int i = 0; i < kMxfp4Batch; ++i) {
    const int64_t v = first + i * kMxfp4Threads;
    if (v >= vectors) continue;
    codes[i] = load_codes<kAligned>(p.blocks + v * 4);
    scales[i] = load_raw<uint8_t>(p.scales + v / kMxfp4Vectors);
  }
#pragma unroll
  for (int i = 0; i < kMxfp4Batch; ++i) {
    const int64_t v = first + i * kMxfp4Threads;
    const float factor = mxfp4_factor(scales[i]);
    float f[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) f[e] = mxfp4_element(codes[i] >> 4 * e) * factor;
    Vec<bf16> out;
    pack(f, out);
    write_vector<kAligned>(static_cast<bf16*>(p.out) + v * kSize, out, v < vectors ? kSize : 0);
  }
}

}  // namespace ivr::cuda
