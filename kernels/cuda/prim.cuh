// Everything kernels need from the machine beneath them: 16-byte vectors, checked memory accesses,
// conversions, warp collectives, shared memory. All PTX and every intrinsic stands here, so that a
// kernel is one source with two compilers: nvcc for the device and a plain C++ compiler for the
// emulator (kernels/cuda/emu/simt.h), which checks what the device does not.
//
// Kernels touch global memory through load and store alone, and shared memory through Shared<T>.
#pragma once

#include <cstdint>
#include <type_traits>

#if !defined(__CUDACC__)
#include "kernels/cuda/emu/simt.h"
#endif

#define IVR_DEVICE __device__ __forceinline__

namespace ivr::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// ---- element types ------------------------------------------------------------------------------

// Own type instead of cuda_bf16.h: a third of the compile time, and the emulator needs one anyway.
struct bf16 {
  uint16_t bits;
};

// Sixteen bytes of T, kept packed: half the registers that unpacked bf16 would take.
template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];
};

IVR_DEVICE float low_half_to_float(uint32_t pair) { return __uint_as_float(pair << 16); }
IVR_DEVICE float high_half_to_float(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to nearest even, `low` in the low half.
IVR_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDACC__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return emu::bf16_bits(low) | static_cast<uint32_t>(emu::bf16_bits(high)) << 16;
#endif
}

IVR_DEVICE void unpack(const Vec<float>& v, float (&f)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) f[i] = __uint_as_float(v.words[i]);
}

IVR_DEVICE void unpack(const Vec<bf16>& v, float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = low_half_to_float(v.words[i]);
    f[2 * i + 1] = high_half_to_float(v.words[i]);
  }
}

IVR_DEVICE void pack(const float (&f)[4], Vec<float>& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v.words[i] = __float_as_uint(f[i]);
}

IVR_DEVICE void pack(const float (&f)[8], Vec<bf16>& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v.words[i] = pack_bf16(f[2 * i], f[2 * i + 1]);
}

IVR_DEVICE int count_bits(uint32_t v) {
#if defined(__CUDACC__)
  return __popc(v);
#else
  return __builtin_popcount(v);
#endif
}

// The index of the highest bit of v != 0.
IVR_DEVICE int highest_bit(uint32_t v) {
#if defined(__CUDACC__)
  return 31 - __clz(static_cast<int>(v));
#else
  return 31 - __builtin_clz(v);
#endif
}

// a / b within 2 ulp; 0 for b beyond 2^126.
IVR_DEVICE float fast_divide(float a, float b) {
#if defined(__CUDACC__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// Rounds to the dtype and back.
template <typename T, int kSize>
IVR_DEVICE void round_to(float (&f)[kSize]) {
  if constexpr (sizeof(T) < sizeof(float)) {
    Vec<T> v;
    pack(f, v);
    unpack(v, f);
  }
}

// The i-th element's bits; i is a constant after unrolling.
template <typename T>
IVR_DEVICE uint32_t element_bits(const Vec<T>& v, int i) {
  return sizeof(T) == 4 ? v.words[i] : (v.words[i / 2] >> (16 * (i % 2))) & 0xffffu;
}

template <typename T>
IVR_DEVICE void insert_element_bits(Vec<T>& v, int i, uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    v.words[i] = bits;
  } else {
    v.words[i / 2] |= bits << (16 * (i % 2));
  }
}

// ---- global memory ------------------------------------------------------------------------------

#if defined(__CUDACC__)

// Not ld.global.nc: what a kernel reads it may also write (y == x, residual_out == residual).
template <typename U>
IVR_DEVICE U load_raw(const void* p) {
  return *static_cast<const U*>(p);
}
template <typename U>
IVR_DEVICE void store_raw(void* p, const U& value) {
  *static_cast<U*>(p) = value;
}
using Bits128 = uint4;

#else

template <typename U>
U load_raw(const void* p) {
  emu::check_read(p, sizeof(U), alignof(U));
  U value;
  __builtin_memcpy(&value, p, sizeof(U));
  return value;
}
template <typename U>
void store_raw(void* p, const U& value) {
  emu::check_write(p, sizeof(U), alignof(U));
  __builtin_memcpy(p, &value, sizeof(U));
}
struct alignas(16) Bits128 {
  uint32_t x, y, z, w;
};

#endif

// p is 16-byte aligned.
template <typename T>
IVR_DEVICE Vec<T> load16(const T* p) {
  const auto bits = load_raw<Bits128>(p);
  return {{bits.x, bits.y, bits.z, bits.w}};
}

template <typename T>
IVR_DEVICE void store16(T* p, const Vec<T>& v) {
  store_raw(p, Bits128{v.words[0], v.words[1], v.words[2], v.words[3]});
}

// The first n elements one by one, zeros after them; p has the alignment of T alone.
template <typename T>
IVR_DEVICE Vec<T> load_elements(const T* p, int n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  Vec<T> v{};
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    if (i < n) insert_element_bits(v, i, load_raw<Bits>(p + i));
  }
  return v;
}

template <typename T>
IVR_DEVICE void store_elements(T* p, const Vec<T>& v, int n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    if (i < n) store_raw(p + i, static_cast<Bits>(element_bits(v, i)));
  }
}

// ---- shared memory ------------------------------------------------------------------------------
//
// IVR_SHARED(T, name, n) declares n elements for the block; IVR_DYNAMIC_SHARED(T, name) names the
// bytes asked for at launch. Both give a Shared<T>: on the device a pointer, under emulation a
// checked one.

#if defined(__CUDACC__)

template <typename T>
using Shared = T*;
#define IVR_SHARED(T, name, n)            \
  __shared__ alignas(16) T name##_mem[n]; \
  const ::ivr::cuda::Shared<T> name = name##_mem
#define IVR_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char ivr_dynamic_shared[]; \
  const ::ivr::cuda::Shared<T> name = reinterpret_cast<T*>(ivr_dynamic_shared)

#else

template <typename T>
using Shared = emu::SharedPointer<T>;
// The lambda's static gives each declaration, in each template instantiation, an identity.
#define IVR_SHARED(T, name, n)                                            \
  const ::ivr::cuda::Shared<T> name = ::ivr::emu::shared_array<T>(n, [] { \
    static char site;                                                     \
    return &site;                                                         \
  }())
#define IVR_DYNAMIC_SHARED(T, name) \
  const ::ivr::cuda::Shared<T> name = ::ivr::emu::dynamic_shared<T>()

#endif

// ---- warp ---------------------------------------------------------------------------------------

// Sum over aligned groups of `width` lanes (a power of two up to 32); every lane gets the same
// bits. All 32 lanes must call it.
IVR_DEVICE float warp_sum(float v, int width) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset < width) v += __shfl_xor_sync(kFullMask, v, offset);
  }
  return v;
}

// The largest of all lanes; all 32 must call it.
IVR_DEVICE float warp_max(float v) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}

}  // namespace ivr::cuda
