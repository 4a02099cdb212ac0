// rope on the GPU (contract: kernels/rope.h).
//
// Mapping    a block owns a token: its angles are computed once, into shared memory, and serve all
//            heads. A thread rotates a vector of 16 bytes of the first half of a head together with
//            its partners in the second half; the dimensions behind them, and v, are copied.
// Bytes      2 * T * (H + 2 K) * D * size.
#pragma once

#include "kernels/cuda/rows.cuh"
#include "kernels/rope.h"

namespace ivr::cuda {

constexpr int kRopeMaxThreads = 256;

struct RopeConfig {
  int threads;
  bool aligned;  // halves, rests and heads are whole vectors and start on 16 bytes
};

inline bool rope_supported(const RopeParams& p) {
  return is_float(p.dtype) && p.T <= kMaxIndex && p.places <= kMaxIndex && p.D <= kRopeMaxDim &&
         (p.H + p.K) * p.D <= kMaxRow;
}

// For a supported, non-empty p.
inline RopeConfig rope_config(const RopeParams& p) {
  const auto aligned = [&](const void* base, int64_t token, int64_t head) {
    return pointer_aligned(base) && stride_aligned(p.dtype, 2, token) &&
           stride_aligned(p.dtype, 2, head);
  };
  const bool whole = stride_aligned(p.dtype, 2, p.half) && stride_aligned(p.dtype, 2, p.D) &&
                     aligned(p.q, p.q_t, p.q_h) && aligned(p.k, p.k_t, p.k_h) &&
                     aligned(p.v, p.v_t, p.v_h) && aligned(p.out, p.out_t, p.out_h) &&
                     aligned(p.k_cache, p.k_page, p.k_cache_h) &&
                     stride_aligned(p.dtype, 2, p.k_p) &&
                     aligned(p.v_cache, p.v_page, p.v_cache_h) && stride_aligned(p.dtype, 2, p.v_p);
  const int64_t vectors = (p.H + p.K) * p.half * static_cast<int64_t>(size_of(p.dtype)) / 16;
  const int64_t threads = (vectors + 31) / 32 * 32;
  return {static_cast<int>(threads < 32                ? 32
                           : threads > kRopeMaxThreads ? kRopeMaxThreads
                                                       : threads),
          whole};
}

// `aligned=1 block=64 grid=320`; returns what snprintf returns.
inline int format(const RopeConfig& c, const RopeParams& p, char* out, size_t size) {
  return std::snprintf(out, size, "aligned=%d block=%d grid=%lld", static_cast<int>(c.aligned),
                       c.threads, static_cast<long long>(p.T));
}

// Within 2 ulp of 1 for |angle| up to 1e9: the reduction by pi / 2 is done in double.
IVR_DEVICE void sine_cosine(float angle, float& sine, float& cosine) {
  constexpr double kTwoOverPi = 0.636619772367581343, kHalfPi = 1.57079632679489662;
  const double x = angle;
  const double turns = rint(x * kTwoOverPi);
  const float r = static_cast<float>(x - turns * kHalfPi);
  const float quadrant = static_cast<float>(turns - 4.0 * rint(turns * 0.25));  // -2 .. 2
  const float r2 = r * r;
  float s = fmaf(-1.9515295891e-4f, r2, 8.3321608736e-3f);
  s = fmaf(s, r2, -1.6666654611e-1f);
  s = fmaf(s * r2, r, r);
  float c = fmaf(2.443315711809948e-5f, r2, -1.388731625493765e-3f);
  c = fmaf(c, r2, 4.166664568298827e-2f);
  c = fmaf(c, r2 * r2, fmaf(-0.5f, r2, 1.0f));
  // Quadrants: 0 (s, c), 1 (c, -s), +-2 (-s, -c), -1 (-c, s).
  const bool odd = quadrant == 1.0f || quadrant == -1.0f;
  const bool half_turn = quadrant == 2.0f || quadrant == -2.0f;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  if (half_turn || quadrant == -1.0f) sine = -sine;
  if (half_turn || quadrant == 1.0f) cosine = -cosine;
}

// The token's angles into shared memory. A sequence out of range gives NaN, which only its own
// request will see.
IVR_DEVICE void rope_angles(const RopeParams& p, int64_t t, Shared<float> sines,
                            Shared<float> cosines) {
  const int32_t sequence = load_raw<int32_t>(p.sequence + t);
  const bool known = sequence >= 0 && sequence < p.B;
  const float position = load_raw<float>(p.positions + t);
  const float scale = known ? load_raw<float>(p.scale + sequence) : 0.0f;
  const float* inv_freq = p.inv_freq + sequence * p.inv_freq_b;
  for (int j = threadIdx.x; j < p.half; j += blockDim.x) {
    const float turn = known ? load_raw<float>(inv_freq + j) : __uint_as_float(0x7fffffffu);
    float s, c;
    sine_cosine(position * turn, s, c);
    sines[j] = s * scale;
    cosines[j] = c * scale;
  }
  __syncthreads();
}

// Elements [at, at + kSize) of a head and their partners; y may be x.
template <bool kAligned, typename T>
IVR_DEVICE void rotate(const T* x, T* y, int at, int half, Shared<float> sines,
                       Shared<float> cosines) {
  constexpr int kSize = Vec<T>::kSize;
  const int n = half - at;
  Vec<T> low = read_vector<kAligned>(x + at, n);
  Vec<T> high = read_vector<kAligned>(x + half + at, n);
  float a[kSize], b[kSize];
  unpack(low, a);
  unpack(high, b);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!kAligned && i >= n) continue;
    const float s = sines[at + i], c = cosines[at + i], first = a[i];
    a[i] = fmaf(first, c, -(b[i] * s));
    b[i] = fmaf(b[i], c, first * s);
  }
  pack(a, low);
  pack(b, high);
  write_vector<kAligned>(y + at, low, n);
  write_vector<kAligned>(y + half + at, high, n);
}

// f(head, at) for the vectors of `heads` heads of `elements` elements each, shared out among the
// threads of the block.
template <typename T, typename F>
IVR_DEVICE void each_vector(int heads, int elements, const F& f) {
  const int vectors = (elements + Vec<T>::kSize - 1) / Vec<T>::kSize;
  for (int i = threadIdx.x; i < heads * vectors; i += blockDim.x) {
    const int head = i / vectors;
    f(head, (i - head * vectors) * Vec<T>::kSize);
  }
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, bool kAligned>
IVR_DEVICE void rope_block(const RopeParams& p) {
  IVR_SHARED(float, sines, kRopeMaxDim / 2);
  IVR_SHARED(float, cosines, kRopeMaxDim / 2);
  const int64_t t = blockIdx.x;
  const int H = static_cast<int>(p.H), K = static_cast<int>(p.K), D = static_cast<int>(p.D);
  const int half = static_cast<int>(p.half), rest = D - 2 * half;
  rope_angles(p, t, sines, cosines);

  const int64_t slot = load_raw<int64_t>(p.slots + t);
  const bool stored = slot >= 0 && slot < p.places;
  const int page = stored ? static_cast<int>(slot) / static_cast<int>(p.P) : 0;
  const int offset = stored ? static_cast<int>(slot) - page * static_cast<int>(p.P) : 0;
  const T* q = static_cast<const T*>(p.q) + t * p.q_t;
  const T* k = static_cast<const T*>(p.k) + t * p.k_t;
  const T* v = static_cast<const T*>(p.v) + t * p.v_t;
  T* out = static_cast<T*>(p.out) + t * p.out_t;
  T* k_cache = static_cast<T*>(p.k_cache) + page * p.k_page + offset * p.k_p;
  T* v_cache = static_cast<T*>(p.v_cache) + page * p.v_page + offset * p.v_p;
  const int heads = stored ? H + K : H;  // those of k behind those of q
  const auto source = [&](int h) { return h < H ? q + h * p.q_h : k + (h - H) * p.k_h; };
  const auto target = [&](int h) {
    return h < H ? out + h * p.out_h : k_cache + (h - H) * p.k_cache_h;
  };

  const auto copy = [](const T* from, T* to, int n) {
    write_vector<kAligned>(to, read_vector<kAligned>(from, n), n);
  };
  each_vector<T>(heads, half, [&](int h, int at) {
    rotate<kAligned>(source(h), target(h), at, half, sines, cosines);
  });
  each_vector<T>(heads, rest, [&](int h, int at) {
    copy(source(h) + 2 * half + at, target(h) + 2 * half + at, rest - at);
  });
  each_vector<T>(stored ? K : 0, D, [&](int h, int at) {
    copy(v + h * p.v_h + at, v_cache + h * p.v_cache_h + at, D - at);
  });
}

}  // namespace ivr::cuda
