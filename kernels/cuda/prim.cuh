// Everything kernels need from the machine beneath them: 16-byte vectors, checked memory accesses,
// conversions, warp collectives, shared memory, asynchronous copies, tensor cores. All PTX and
// every intrinsic stands here, so that a kernel is one source with two compilers: nvcc for the
// device and a plain C++ compiler for the emulator (kernels/cuda/emu/simt.h), which checks what the
// device does not.
//
// Kernels touch global memory through load and store alone, and shared memory through Shared<T>.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/tensor_box.h"

#if !defined(__CUDACC__)
#include "kernels/cuda/emu/simt.h"
#endif

#define IVR_DEVICE __device__ __forceinline__

// Whether wgmma and setmaxnreg exist for what is being compiled: sm_90a alone, and emulation.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define IVR_HAS_WGMMA 1
#endif

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
using Bits64 = uint2;
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
struct alignas(8) Bits64 {
  uint32_t x, y;
};
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

// The same for memory that no kernel writes meanwhile and that nobody reads again: it passes by the
// L1 cache.
template <typename T>
IVR_DEVICE Vec<T> load16_once(const T* p) {
#if defined(__CUDACC__)
  Vec<T> v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
      : "l"(p));
  return v;
#else
  return load16(p);
#endif
}

template <typename T>
IVR_DEVICE void store16(T* p, const Vec<T>& v) {
  store_raw(p, Bits128{v.words[0], v.words[1], v.words[2], v.words[3]});
}

// Four elements as floats; p is aligned to four elements.
IVR_DEVICE void load_quad(const float* p, float (&f)[4]) { unpack(load16(p), f); }

IVR_DEVICE void load_quad(const bf16* p, float (&f)[4]) {
  const auto bits = load_raw<Bits64>(p);
  f[0] = low_half_to_float(bits.x);
  f[1] = high_half_to_float(bits.x);
  f[2] = low_half_to_float(bits.y);
  f[3] = high_half_to_float(bits.y);
}

IVR_DEVICE void store_quad(float* p, const float (&f)[4]) {
  Vec<float> v;
  pack(f, v);
  store16(p, v);
}

IVR_DEVICE void store_quad(bf16* p, const float (&f)[4]) {
  store_raw(p, Bits64{pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3])});
}

IVR_DEVICE float load_float(const void* base, int64_t i, bool in_fp32) {
  return in_fp32 ? __uint_as_float(load_raw<uint32_t>(static_cast<const float*>(base) + i))
                 : low_half_to_float(load_raw<uint16_t>(static_cast<const bf16*>(base) + i));
}

IVR_DEVICE void store_float(void* base, int64_t i, float v, bool in_fp32) {
  in_fp32 ? store_raw(static_cast<float*>(base) + i, __float_as_uint(v))
          : store_raw(static_cast<bf16*>(base) + i, static_cast<uint16_t>(pack_bf16(v, 0.0f)));
}

// Elements i and i + 1; their address is a multiple of both together.
IVR_DEVICE void load_pair(const void* base, int64_t i, bool in_fp32, float (&f)[2]) {
  if (in_fp32) {
    const auto bits = load_raw<Bits64>(static_cast<const float*>(base) + i);
    f[0] = __uint_as_float(bits.x);
    f[1] = __uint_as_float(bits.y);
  } else {
    const auto bits = load_raw<uint32_t>(static_cast<const bf16*>(base) + i);
    f[0] = low_half_to_float(bits);
    f[1] = high_half_to_float(bits);
  }
}

IVR_DEVICE void store_pair(void* base, int64_t i, bool in_fp32, float f0, float f1) {
  in_fp32
      ? store_raw(static_cast<float*>(base) + i, Bits64{__float_as_uint(f0), __float_as_uint(f1)})
      : store_raw(static_cast<bf16*>(base) + i, pack_bf16(f0, f1));
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
// bytes asked for at launch, aligned to 1024 as swizzled tiles have to be. Both give a Shared<T>:
// on the device a pointer, under emulation a checked one.

#if defined(__CUDACC__)

template <typename T>
using Shared = T*;
#define IVR_SHARED(T, name, n)            \
  __shared__ alignas(16) T name##_mem[n]; \
  const ::ivr::cuda::Shared<T> name = name##_mem
#define IVR_DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char ivr_dynamic_shared[]; \
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

// 16 bytes of shared memory; p is 16-byte aligned.
template <typename T>
IVR_DEVICE Vec<T> load16_shared(Shared<T> p) {
#if defined(__CUDACC__)
  const auto bits = *reinterpret_cast<const Bits128*>(p);
#else
  emu::shared_access16(p.get(), false);
  Bits128 bits;
  __builtin_memcpy(&bits, p.get(), 16);
#endif
  return {{bits.x, bits.y, bits.z, bits.w}};
}

template <typename T>
IVR_DEVICE void store16_shared(Shared<T> p, const Vec<T>& v) {
#if defined(__CUDACC__)
  *reinterpret_cast<Bits128*>(p) = Bits128{v.words[0], v.words[1], v.words[2], v.words[3]};
#else
  emu::shared_access16(p.get(), true);
  __builtin_memcpy(p.get(), v.words, 16);
#endif
}

// The same memory as elements of U.
template <typename U, typename T>
IVR_DEVICE Shared<U> shared_cast(Shared<T> p) {
#if defined(__CUDACC__)
  return reinterpret_cast<U*>(p);
#else
  return Shared<U>(reinterpret_cast<U*>(p.get()));
#endif
}

// ---- asynchronous copies ------------------------------------------------------------------------
//
// A copy belongs to the group that the issuing thread commits next. Once a thread has waited, its
// own copies are in shared memory; other threads see them after a barrier.

// 16 bytes from global to shared memory, both aligned; zeros, and no access to `from`, unless
// valid.
template <typename T>
IVR_DEVICE void copy16_async(Shared<T> to, const T* from, bool valid) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  emu::copy_async(to.get(), from, valid ? 16 : 0);
#endif
}

IVR_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::commit_copies();
#endif
}

// All groups but the newest kNewest have landed.
template <int kNewest>
IVR_DEVICE void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#else
  emu::wait_copies(kNewest);
#endif
}

// ---- mbarriers and bulk copies, sm_90 -----------------------------------------------------------
//
// A barrier's phases count from 0; a phase is over after its arrivals and the bytes that they
// expect. A wait for the phase before the first returns at once.

using Barrier = uint64_t;

// By one thread; the others know of it after __syncthreads.
IVR_DEVICE void barrier_init(Shared<Barrier> barrier, int arrivals) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async.shared::cta;" ::"r"(address),
      "r"(arrivals)
      : "memory");
#else
  emu::barrier_init(barrier.get(), arrivals);
#endif
}

IVR_DEVICE void barrier_arrive(Shared<Barrier> barrier) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
#else
  emu::barrier_arrive(barrier.get(), 0);
#endif
}

// Arrives, and lets the phase wait for so many bytes of bulk copies.
IVR_DEVICE void barrier_expect(Shared<Barrier> barrier, int bytes) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
#else
  emu::barrier_arrive(barrier.get(), bytes);
#endif
}

// Returns once phase `phase` is over, of the last two.
IVR_DEVICE void barrier_wait(Shared<Barrier> barrier, int phase) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(address), "r"(phase & 1)
        : "memory");
  }
#else
  emu::barrier_wait(barrier.get(), phase & 1);
#endif
}

// A multiple of 16 bytes from global to shared memory, both aligned, by one thread; the barrier
// gets the bytes.
template <typename T>
IVR_DEVICE void copy_bulk(Shared<T> to, const T* from, int bytes, Shared<Barrier> barrier) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const auto signal = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address),
      "l"(from), "r"(bytes), "r"(signal)
      : "memory");
#else
  emu::copy_bulk(to.get(), from, static_cast<size_t>(bytes), barrier.get());
#endif
}

// ---- bulk tensor copies, sm_90 ------------------------------------------------------------------

// A TensorBox as the device reads it; a __grid_constant__ parameter of the kernel.
#if defined(__CUDACC__)
struct alignas(128) TensorMap {
  uint64_t words[16];
};
#else
using TensorMap = TensorBox;
#endif

// The box whose first element has the coordinates `at`, contiguous dimension first, by one thread.
// What lies outside of the tensor becomes zero; the barrier gets the bytes of the whole box.
template <typename T, int kRank>
IVR_DEVICE void copy_tensor(Shared<T> to, const TensorMap& map, const int (&at)[kRank],
                            Shared<Barrier> barrier) {
  static_assert(kRank >= 2 && kRank <= 4);
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const auto signal = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(address),
        "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(address),
        "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(address),
        "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
#else
  emu::copy_tensor(to.get(), map, at, kRank, barrier.get());
#endif
}

// Shared memory that this thread has written by ordinary stores may be read by bulk copies and
// wgmma of whoever meets it at a barrier after this.
IVR_DEVICE void fence_async_reads() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emu::fence_async_reads();
#endif
}

#if defined(__CUDACC__)
// For code that a device must never reach: the launch fails.
IVR_DEVICE void trap() { asm volatile("trap;"); }
#endif

// ---- named barriers and registers ---------------------------------------------------------------
//
// Barriers 1 to 15 of a block (0 is __syncthreads), each for `threads` threads, a multiple of 32:
// those that wait and those that only say that they have come.

IVR_DEVICE void named_barrier_sync(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::named_barrier(id, threads, true);
#endif
}

IVR_DEVICE void named_barrier_arrive(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::named_barrier(id, threads, false);
#endif
}

// Registers a thread of this warpgroup from here on, fewer or more than before: what some give up
// others can take. All four warps call it.
template <int kRegisters>
IVR_DEVICE void give_up_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emu::set_registers(kRegisters);
#endif
}

template <int kRegisters>
IVR_DEVICE void take_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emu::set_registers(kRegisters);
#endif
}

// ---- tensor cores -------------------------------------------------------------------------------
//
// Fragments of lane l, with g = l / 4 and j = 2 (l % 4); every register is a pair of bf16:
//   a [16, 16]   a[0] (g, j)  a[1] (g + 8, j)  a[2] (g, j + 8)  a[3] (g + 8, j + 8)
//   b [16, 8]    b[0] (j, g)  b[1] (j + 8, g), pairs along k
//   d [16, 8]    d[0], d[1] (g, j), (g, j + 1)   d[2], d[3] (g + 8, j), (g + 8, j + 1)

// Four 8x8 matrices: lane 8m + r names row r of matrix m (16 bytes, aligned), and every lane gets
// (g, j), (g, j + 1) of matrix m in r[m]; with kTransposed (j, g), (j + 1, g).
template <bool kTransposed>
IVR_DEVICE void load_matrices(uint32_t (&r)[4], Shared<bf16> row) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emu::ldmatrix(r, row.get(), kTransposed);
#endif
}

// d += a b, products exact, sums in fp32.
IVR_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emu::mma_bf16(d, a, b);
#endif
}

// ---- tensor cores of a warpgroup, sm_90a --------------------------------------------------------
//
// d [64, N] += a [64, 16] b [16, N] by the 128 threads of a warpgroup, asynchronously. Warp w has
// rows [16 w, 16 w + 16); d[n] is its fragment of columns [8 n, 8 n + 8), laid out like d of mma
// above, and so is a where it is in registers. The order is
//
//   wgmma_fence(registers...)   whatever ordinary code has written or read before
//   wgmma(...)                  any number; those of one d run one behind the other
//   wgmma_commit()              they are a group
//   wgmma_wait<newest>(d...)    all groups but the newest have ended; these d can be used
//
// and until the wait nobody touches d, a, or the shared memory that is read.

#if defined(__CUDACC__)
// Keeps the compiler from moving ordinary uses of registers across the point where this stands.
template <int kTiles>
IVR_DEVICE void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}
template <int kTiles>
IVR_DEVICE void pin(uint32_t (&a)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
#endif

template <typename... Registers>
IVR_DEVICE void wgmma_fence(Registers&... registers) {
#if defined(__CUDACC__)
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  (emu::name_registers(registers, sizeof(registers)), ...);
  emu::wgmma_fence();
#endif
}

IVR_DEVICE void wgmma_commit() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emu::wgmma_commit();
#endif
}

template <int kNewest, typename... Accumulators>
IVR_DEVICE void wgmma_wait(Accumulators&... d) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
  (pin(d), ...);
#else
  emu::wgmma_wait(kNewest);
  (emu::check_landed(d, sizeof(d)), ...);
#endif
}

// A matrix in shared memory, as wgmma finds its elements. With 128-byte rows of 64 elements,
// swizzled, from a multiple of 1024 on:
//   rows are the matrix's rows (of a), or columns (of b)   `stride` bytes between eights of rows;
//       16 k further is 32 bytes further
//   kTransposed, rows are k      `stride` bytes between eights of k, `leading` between sixty-fours
//       of columns
// start, leading and stride are multiples of 16 bytes.
IVR_DEVICE uint64_t matrix_descriptor(Shared<bf16> start, int leading, int stride,
                                      Swizzle swizzle = Swizzle::bytes128) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(start));
#else
  const uint32_t address = emu::shared_address(start.get());
#endif
  return (address & 0x3ffffu) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

#if defined(__CUDACC__)
#define IVR_TILE(d, n) "+f"((d)[n][0]), "+f"((d)[n][1]), "+f"((d)[n][2]), "+f"((d)[n][3])
#define IVR_TILES_2(d, n) IVR_TILE(d, n), IVR_TILE(d, n + 1)
#define IVR_TILES_8(d, n) \
  IVR_TILES_2(d, n), IVR_TILES_2(d, n + 2), IVR_TILES_2(d, n + 4), IVR_TILES_2(d, n + 6)
#define IVR_TILES_16(d, n) IVR_TILES_8(d, n), IVR_TILES_8(d, n + 8)
#define IVR_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define IVR_NAMES_64                                                                              \
  IVR_NAMES_16                                                                                    \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26" \
  ", %27, %28, %29, %30, %31"
#define IVR_NAMES_128                                                                            \
  IVR_NAMES_64                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Arguments behind the shape are the numbers of the operands.
#define IVR_WGMMA_REGISTERS(columns, tiles, a0, a1, a2, a3, b_, add, transposed)            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add                                    \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #columns                                 \
               "k16.f32.bf16.bf16 "                                                         \
               "{" IVR_NAMES_##columns "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_ \
                                       ", p, 1, 1, %" #transposed ";\n}"                    \
               : IVR_TILES_##tiles(d, 0)                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                        \
                 "r"(static_cast<int>(accumulate)), "n"(kTransposed ? 1 : 0))
#define IVR_WGMMA_SHARED(columns, tiles, a_, b_, add, transposed)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add                                         \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #columns                                      \
               "k16.f32.bf16.bf16 "                                                              \
               "{" IVR_NAMES_##columns "}, %" #a_ ", %" #b_ ", p, 1, 1, 0, %" #transposed ";\n}" \
               : IVR_TILES_##tiles(d, 0)                                                         \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposed ? 1 : 0))
#endif

// a in registers. d: the first of kN / 8 tiles. Without `accumulate` d's old values do not count.
template <int kN, bool kTransposed>
IVR_DEVICE void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kN == 16 || kN == 64 || kN == 128);
#if defined(__CUDACC__)
  if constexpr (kN == 16) {
    IVR_WGMMA_REGISTERS(16, 2, 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (kN == 64) {
    IVR_WGMMA_REGISTERS(64, 8, 32, 33, 34, 35, 36, 37, 38);
  } else {
    IVR_WGMMA_REGISTERS(128, 16, 64, 65, 66, 67, 68, 69, 70);
  }
#else
  emu::wgmma(d, kN, a, 0, b, kTransposed, accumulate);
#endif
}

// a in shared memory, its rows not transposed.
template <int kN, bool kTransposed>
IVR_DEVICE void wgmma(float (*d)[4], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 16 || kN == 64 || kN == 128);
#if defined(__CUDACC__)
  if constexpr (kN == 16) {
    IVR_WGMMA_SHARED(16, 2, 8, 9, 10, 11);
  } else if constexpr (kN == 64) {
    IVR_WGMMA_SHARED(64, 8, 32, 33, 34, 35);
  } else {
    IVR_WGMMA_SHARED(128, 16, 64, 65, 66, 67);
  }
#else
  emu::wgmma(d, kN, nullptr, a, b, kTransposed, accumulate);
#endif
}

// a b, rounded: never the first half of a fused multiply-add.
IVR_DEVICE float multiply_rounded(float a, float b) {
#if defined(__CUDACC__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// 2^x; 0 for x = -inf, exactly 1 for 0. Relative error about 2^-22.
IVR_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

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
