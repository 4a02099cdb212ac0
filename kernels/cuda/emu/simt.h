// A CUDA block on one CPU thread: each CUDA thread is a fibre that runs until it meets a barrier or
// a warp collective. Kernel sources see CUDA's own vocabulary (threadIdx, __syncthreads, ...) and
// prim.cuh; what is checked here is what a device would get wrong in silence:
//
//   order       fibres and blocks run in an order drawn from the seed
//   barriers    divergence, threads that never arrive, lanes missing from a mask: an error report
//   shared      starts as NaN and as "never written"; every access is checked for bounds, for
//               reading the unwritten, and for a race (no barrier between accesses of two threads)
//   global      every access lies within one registered range and is aligned
//   copies      an asynchronous copy lands in the wait that asks for it, not before: until then its
//               bytes may be neither read nor written, and other threads need a barrier after it
//   mbarriers   phases of arrivals and bytes; a wait orders what was done before the arrivals. A
//               bulk copy, plain or of a tensor's box, lands when no thread can go on without it
//   named       barriers of some threads, of which some may only arrive
//   tensor core ldmatrix and mma.sync by their fragment layouts, all lanes of a warp together
//   wgmma       reads its matrices through descriptors, at the wait and not before. Until then its
//               accumulators are NaN and its operands locked; registers have to be as the last
//               fence saw them, ordinary stores need a fence of the asynchronous proxy, and the
//               four warps have to issue the same
//
// The first finding ends the launch and is reported with thread and block. Rules are stricter than
// the device's: a mask may name only lanes that take part, and a __syncthreads is met by the whole
// block at one place.
//
// Not modelled: memory order between blocks, the rounding inside of a tensor core (here a chain of
// fp32 additions over k), base offsets of matrices that start inside of a swizzle's pattern (an
// error here), a warpgroup that waits for registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>

#include "kernels/cuda/tensor_box.h"

namespace ivr::emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

// What the running fibre reads as threadIdx and so on.
struct Coordinates {
  Dim3 thread, block, block_dim, grid_dim;
};
const Coordinates& coordinates();

struct Limits {
  static constexpr unsigned kThreads = 1024;
  static constexpr size_t kStaticShared = 48 * 1024;
  static constexpr size_t kDynamicShared = 227 * 1024;
  static constexpr int kRegisters = 65536;
};

class Machine {
 public:
  // capability: of the device that launchers choose their kernels for, 80 or 90.
  Machine(uint64_t seed, int capability);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // Global memory that kernels may touch. An access has to lie within one range, so that ranges
  // registered row by row catch a read behind a row even where the next one follows. `name` is a
  // literal; row < 0: none. Without any range global memory is unchecked.
  void allow_read(const void* begin, int64_t bytes, const char* name, int64_t row = -1);
  void allow_write(const void* begin, int64_t bytes, const char* name, int64_t row = -1);

  // Runs body() once per thread of the grid. False: report() says what was found.
  template <typename F>
  bool launch(Dim3 grid, Dim3 block, size_t dynamic_shared, const F& body) {
    const auto call = [](const void* f) { (*static_cast<const F*>(f))(); };
    return launch_threads(grid, block, dynamic_shared, call, &body);
  }
  const std::string& report() const;
  int capability() const { return capability_; }

  struct State;

 private:
  bool launch_threads(Dim3 grid, Dim3 block, size_t dynamic_shared, void (*body)(const void*),
                      const void* argument);

  std::unique_ptr<State> state_;
  int capability_;
};

// ---- what prim.cuh and kernels call, from inside a fibre ----------------------------------------

void check_read(const void* p, size_t bytes, size_t alignment);
void check_write(const void* p, size_t bytes, size_t alignment);

void sync_threads(const char* file, int line);

enum class Collective {
  sync_warp,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  ldmatrix,
  mma,
  wgmma_fence,
  wgmma,
  wgmma_commit,
  wgmma_wait,
};
// Rendezvous of the lanes in mask. Shuffles return the value of the lane that `lane` and `width`
// name, ballot the mask of lanes with a nonzero value.
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int lane, int width);

void* shared_bytes(size_t bytes, const void* site);
void* dynamic_shared_bytes();
void shared_access(const void* p, size_t bytes, bool write);
// 16 bytes at once.
void shared_access16(const void* p, bool write);

// Matrix m has the rows that lanes 8m .. 8m + 7 name, 8 elements of 16 bits each; the calling lane
// gets its fragment of matrix m in r[m].
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed);
// d += a b: a [16, 16] and b [16, 8] bf16, d [16, 8] fp32, as fragments of m16n8k16.
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// 16 bytes to shared memory, of which the first source_bytes come from global memory and the rest
// are zero.
void copy_async(void* shared, const void* global, size_t source_bytes);
void commit_copies();
// All groups of the calling thread but its newest `newest` have landed.
void wait_copies(int newest);

// mbarrier: a phase is over after `arrivals` arrivals and as many bytes as were expected.
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int64_t expected_bytes);
// Returns once the phase of this parity is over.
void barrier_wait(uint64_t* barrier, int parity);
// Any multiple of 16 bytes; reports them to the barrier when they are there.
void copy_bulk(void* shared, const void* global, size_t bytes, uint64_t* barrier);

// The box at `at`, [rank], with zeros for what lies outside of the tensor.
void copy_tensor(void* shared, const cuda::TensorBox& box, const int* at, int rank,
                 uint64_t* barrier);
// What the calling thread has stored may be read by the asynchronous proxy.
void fence_async_reads();

// Returns once `threads` threads have come to barrier `id`; at once for those that do not wait.
void named_barrier(int id, int threads, bool wait);
// setmaxnreg: the block's warpgroups may not ask for more than there are.
void set_registers(int registers);

// wgmma. A fence makes the registers that were named before it, as they are then, ready for use.
void name_registers(const void* registers, size_t bytes);
void wgmma_fence();
// d [64, n] (+)= a [64, 16] b [16, n]: a from registers or, where they are null, from shared
// memory.
void wgmma(float (*d)[4], int n, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix,
           bool transposed, bool accumulate);
void wgmma_commit();
// All groups of the calling warp but its newest `newest` have landed.
void wgmma_wait(int newest);
// Complains about accumulators that are still in flight.
void check_landed(const void* d, size_t bytes);
// Where a descriptor says that a matrix starts; a multiple of 16.
uint32_t shared_address(const void* p);

// Shared memory element: reads and writes go through the checks.
template <typename T>
class SharedReference {
 public:
  explicit SharedReference(T* p) : p_(p) {}
  operator T() const {  // NOLINT: stands for a T&
    shared_access(p_, sizeof(T), false);
    return *p_;
  }
  SharedReference& operator=(T value) {
    shared_access(p_, sizeof(T), true);
    *p_ = value;
    return *this;
  }
  SharedReference& operator=(const SharedReference& other) { return *this = static_cast<T>(other); }
  SharedReference& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

 private:
  T* p_;
};

template <typename T>
class SharedPointer {
 public:
  explicit SharedPointer(T* p) : p_(p) {}
  SharedReference<T> operator[](int64_t i) const { return SharedReference<T>(p_ + i); }
  SharedReference<T> operator*() const { return SharedReference<T>(p_); }
  SharedPointer operator+(int64_t n) const { return SharedPointer(p_ + n); }
  // For the accesses that prim.cuh makes: the address, unchecked.
  T* get() const { return p_; }

 private:
  T* p_;
};

template <typename T>
SharedPointer<T> shared_array(size_t n, const void* site) {
  return SharedPointer<T>(static_cast<T*>(shared_bytes(n * sizeof(T), site)));
}

template <typename T>
SharedPointer<T> dynamic_shared() {
  return SharedPointer<T>(static_cast<T*>(dynamic_shared_bytes()));
}

template <typename T>
T shuffle_value(Collective kind, uint32_t mask, T value, int lane, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(kind, mask, bits, lane, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Round to nearest even; every NaN becomes the device's.
inline uint16_t bf16_bits(float f) {
  if (std::isnan(f)) return 0x7fff;
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace ivr::emu

// ---- CUDA's vocabulary --------------------------------------------------------------------------

#define __device__
#define __host__
#define __forceinline__ inline
#define threadIdx (::ivr::emu::coordinates().thread)
#define blockIdx (::ivr::emu::coordinates().block)
#define blockDim (::ivr::emu::coordinates().block_dim)
#define gridDim (::ivr::emu::coordinates().grid_dim)
#define __syncthreads() ::ivr::emu::sync_threads(__FILE__, __LINE__)

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  ::ivr::emu::warp_collective(::ivr::emu::Collective::sync_warp, mask, 0, 0, 32);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
  return ::ivr::emu::shuffle_value(::ivr::emu::Collective::shuffle, mask, value, lane, width);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32) {
  return ::ivr::emu::shuffle_value(::ivr::emu::Collective::shuffle_up, mask, value, delta, width);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32) {
  return ::ivr::emu::shuffle_value(::ivr::emu::Collective::shuffle_down, mask, value, delta, width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  return ::ivr::emu::shuffle_value(::ivr::emu::Collective::shuffle_xor, mask, value, bits, width);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return static_cast<uint32_t>(
      ::ivr::emu::warp_collective(::ivr::emu::Collective::ballot, mask, predicate != 0, 0, 32));
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  return bits;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
