// Matrix tiles: 8 registers of 16 rows of 64 bytes, all of full size.
//
// A Tiles object configures the thread's tiles and releases them at its end. Compiled with AMX it
// emits the instructions; compiled without, the same interface runs on software tiles, so that the
// kernels are tested on machines that have none.
//
// Tiles multiply beside the vector units, but instructions are only looked at some 500 ahead:
// vector work has to stand between the tile products (Spread) to be done meanwhile.
#pragma once

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

// Written as assembly because the compiler's intrinsics take only literal register numbers, and
// gcc 12's ldtilecfg does not tell that it reads memory. No compiler keeps anything of its own in
// tile registers, so none are declared as overwritten; volatile keeps the order.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Row r at base + r * stride bytes.
  template <int kTile>
  void load(const void* base, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(base), "r"(stride) : "memory");
  }
  template <int kTile>
  void store(void* base, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
                 :
                 : "i"(kTile), "r"(base), "r"(stride)
                 : "memory");
  }
  // C [16][16] fp32 += A [16][16 pairs] * B [16 pairs][16][2], bf16.
  template <int kC, int kA, int kB>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  // C [16][16] int32 += A [16][16 quads] int8 * B [16 quads][16][4] uint8.
  template <int kC, int kA, int kB>
  void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

#else

class Tiles {
 public:
  Tiles() { memset(tile_, 0xff, sizeof(tile_)); }

  template <int kTile>
  void zero() {
    memset(tile_[kTile], 0, sizeof(tile_[kTile]));
  }
  template <int kTile>
  void load(const void* base, int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      memcpy(tile_[kTile][r], static_cast<const char*>(base) + r * stride, 64);
    }
  }
  template <int kTile>
  void store(void* base, int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      memcpy(static_cast<char*>(base) + r * stride, tile_[kTile][r], 64);
    }
  }
  // The instruction's arithmetic: a chain over the even k and one over the odd, both from zero;
  // their sum is added to C. Rounded to nearest even, denormals count as zero everywhere.
  template <int kC, int kA, int kB>
  void multiply() {
    const uint32_t callers = _mm_getcsr();
    set_control(kFlushDenormals);
    for (int v = 0; v < 16 / kLanes; ++v) {
      F even[16], odd[16];
      for (int k = 0; k < 16; ++k) {
        const bf16* pairs = reinterpret_cast<const bf16*>(tile_[kB][k] + v * kLanes * 4);
        even[k] = load_even(pairs);
        odd[k] = load_odd(pairs);
      }
      for (int m = 0; m < 16; ++m) {
        float* row = reinterpret_cast<float*>(tile_[kC][m]) + v * kLanes;
        const bf16* a = reinterpret_cast<const bf16*>(tile_[kA][m]);
        F sum_even = set(0.0f), sum_odd = set(0.0f);
        for (int k = 0; k < 16; ++k) {
          sum_even = fma(set(to_float(a[2 * k])), even[k], sum_even);
          sum_odd = fma(set(to_float(a[2 * k + 1])), odd[k], sum_odd);
        }
        ivr::store(row, ivr::load(row) + (sum_even + sum_odd));
      }
    }
    set_control(callers);
  }
  template <int kC, int kA, int kB>
  void multiply_bytes() {
    for (int m = 0; m < 16; ++m) {
      int32_t* row = reinterpret_cast<int32_t*>(tile_[kC][m]);
      const int8_t* a = reinterpret_cast<const int8_t*>(tile_[kA][m]);
      for (int k = 0; k < 64; ++k) {
        for (int n = 0; n < 16; ++n) row[n] += a[k] * tile_[kB][k / 4][4 * n + k % 4];
      }
    }
  }

 private:
  // All exceptions masked, results and operands that are denormal become zero.
  static constexpr uint32_t kFlushDenormals = 0x9fc0;

  // The tiles are named, so that their arithmetic stays between two changes.
  void set_control(uint32_t control) { asm volatile("ldmxcsr %1" : "+m"(tile_) : "m"(control)); }

  alignas(64) unsigned char tile_[8][16][64];
};

#endif

// Work of so many parts, spread evenly over so many calls.
struct Spread {
  int64_t parts, calls;
  int64_t call = 0, done = 0;

  template <class Part>
  void operator()(Part&& part) {
    for (++call; done * calls < parts * call; ++done) part(done);
  }
  template <class Part>
  void finish(Part&& part) {
    for (; done < parts; ++done) part(done);
  }
};

}  // namespace
}  // namespace ivr
