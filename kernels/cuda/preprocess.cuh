// preprocess on the GPU (contract: kernels/preprocess.h): the CPU's integers, in any order, are the
// CPU's bytes.
//
// Mapping    along x a thread makes one pixel of a line, along y sixteen bytes of a row: neighbours
//            read the same cache lines, and nothing is kept between threads.
// Layout     between the passes the picture is planar where y comes second, so that sixteen bytes
//            are sixteen pixels of one channel; packed RGB where y comes first. Rows of either are
//            padded to 16 bytes.
// Bytes      the picture once, twice the picture between the passes, the tiles once.
#pragma once

#include <cstdio>

#include "kernels/cuda/rows.cuh"
#include "kernels/preprocess.h"

namespace ivr::cuda {

constexpr int kPreprocessThreads = 128;

// A picture between the passes.
struct MidPicture {
  uint8_t* data;
  int64_t lines;  // rows of pixels
  int64_t pitch;  // bytes from row to row
  int64_t plane;  // bytes from channel to channel; 1: packed
};

inline MidPicture mid_picture(const PreprocessTarget& t) {
  const int64_t lines = t.vertical_first ? t.y.n_out : t.y.n_in;
  const int64_t pitch = preprocess_mid_pitch(t);
  return {t.mid, lines, pitch, t.vertical_first ? 1 : lines * pitch};
}

// Sixteen pixels lie in one tile, and their values start on 16 bytes.
inline bool preprocess_tiles_aligned(const PreprocessParams& p, const PreprocessTarget& t) {
  return p.S % 16 == 0 && pointer_aligned(t.out);
}

inline bool preprocess_image_aligned(const PreprocessParams& p) {
  return pointer_aligned(p.image) && p.row_stride % 16 == 0;
}

// Threads of a pass: pixels of all lines, or vectors of 16 bytes of all rows.
inline int64_t along_x_threads(const PreprocessTarget& t) {
  return (t.vertical_first ? t.y.n_out : t.y.n_in) * t.x.n_out;
}
inline int64_t along_y_threads(const PreprocessTarget& t) {
  return t.y.n_out * (t.vertical_first ? 1 : 3) * (preprocess_mid_pitch(t) / 16);
}

inline bool preprocess_supported(const PreprocessParams& p) {
  bool fits = is_float(p.dtype);
  for (int64_t i = 0; i < p.n_targets; ++i) {
    const PreprocessTarget& t = p.targets[i];
    fits = fits && pointer_aligned(t.mid) && along_x_threads(t) <= kMaxIndex &&
           along_y_threads(t) <= kMaxIndex && preprocess_mid_pitch(t) <= kMaxRow;
  }
  return fits;
}

// A pass of one target, for the launcher and the emulator alike: threads, and which kernel.
struct PreprocessPass {
  MidPicture mid;
  bool along_y;
  bool last;  // writes tiles, not the picture between the passes
  int64_t threads;
  bool aligned;
};

inline PreprocessPass preprocess_pass(const PreprocessParams& p, const PreprocessTarget& t,
                                      bool last) {
  const bool along_y = t.vertical_first != last;
  const bool aligned =
      along_y && (last ? preprocess_tiles_aligned(p, t) : preprocess_image_aligned(p));
  return {mid_picture(t), along_y, last, along_y ? along_y_threads(t) : along_x_threads(t),
          aligned};
}

// f.template operator()<T, kAlongY, kLast, kAligned>() for the kernel of a pass. Before the tiles
// the dtype means nothing.
template <typename F>
void with_preprocess_kernel(DType dtype, const PreprocessPass& pass, F&& f) {
  const auto with_place = [&]<typename T, bool kAligned>() {
    if (pass.along_y) {
      pass.last ? f.template operator()<T, true, true, kAligned>()
                : f.template operator()<float, true, false, kAligned>();
    } else {
      pass.last ? f.template operator()<T, false, true, false>()
                : f.template operator()<float, false, false, false>();
    }
  };
  with_element(dtype, pass.aligned, with_place);
}

// ---- device -------------------------------------------------------------------------------------

IVR_DEVICE int resample_weight(const ResampleAxis& axis, int o, int i) {
  const int16_t* hi = axis.weights + static_cast<int64_t>(o) * 2 * axis.taps + i;
  return load_raw<int16_t>(hi) * (1 << kResampleDigitBits) + load_raw<int16_t>(hi + axis.taps);
}

IVR_DEVICE uint32_t resample_byte(int sum) {
  sum >>= kResampleBits;
  return static_cast<uint32_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

// The first n of sixteen bytes, zeros behind them.
template <bool kAligned>
IVR_DEVICE Vec<uint8_t> read_bytes(const uint8_t* p, int64_t n) {
  if (kAligned && n >= 16) return load16(p);
  Vec<uint8_t> v{};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < n) v.words[i / 4] |= uint32_t{load_raw<uint8_t>(p + i)} << (8 * (i % 4));
  }
  return v;
}

// Where pixel (x, y) of a target lies, channel 0.
template <typename T>
IVR_DEVICE T* tile_pixel(const PreprocessParams& p, const PreprocessTarget& t, int x, int y) {
  const int S = static_cast<int>(p.S);
  const int64_t tile = y / S * t.columns + x / S;
  return static_cast<T*>(t.out) + (tile * 3 * S + y % S) * S + x % S;
}

// The bits of a byte's value.
template <typename T>
IVR_DEVICE uint32_t table_bits(const PreprocessParams& p, int channel, uint32_t byte) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  return load_raw<Bits>(static_cast<const T*>(p.table) + channel * 256 + byte);
}

// One pixel of one line.
template <typename T, bool kLast>
IVR_DEVICE void resample_along_x(const PreprocessParams& p, const PreprocessTarget& t,
                                 const MidPicture& mid, int thread) {
  const int width = static_cast<int>(t.x.n_out), line = thread / width, o = thread % width;
  const uint8_t* row = kLast ? mid.data + line * mid.pitch : p.image + line * p.row_stride;
  const int count = load_raw<int32_t>(t.x.count + o);
  const uint8_t* pixel = row + int64_t{3} * load_raw<int32_t>(t.x.first + o);
  int sum[3] = {1 << (kResampleBits - 1), 1 << (kResampleBits - 1), 1 << (kResampleBits - 1)};
  for (int i = 0; i < count; ++i) {
    const int weight = resample_weight(t.x, o, i);
#pragma unroll
    for (int c = 0; c < 3; ++c) sum[c] += weight * load_raw<uint8_t>(pixel + 3 * i + c);
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const uint32_t byte = resample_byte(sum[c]);
    if constexpr (kLast) {
      using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
      store_raw(tile_pixel<T>(p, t, o, line) + c * p.S * p.S,
                static_cast<Bits>(table_bits<T>(p, c, byte)));
    } else {
      store_raw(mid.data + c * mid.plane + line * mid.pitch + o, static_cast<uint8_t>(byte));
    }
  }
}

// Sixteen pixels of one channel, from bytes to values.
template <typename T, bool kAligned>
IVR_DEVICE void write_values(const PreprocessParams& p, const PreprocessTarget& t, int channel,
                             int x, int y, const uint32_t (&byte)[16]) {
  constexpr int kSize = Vec<T>::kSize;
  const int64_t plane = channel * p.S * p.S;
  if constexpr (kAligned) {
    T* out = tile_pixel<T>(p, t, x, y) + plane;
#pragma unroll
    for (int i = 0; i < 16; i += kSize) {
      Vec<T> v{};
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        insert_element_bits(v, j, table_bits<T>(p, channel, byte[i + j]));
      }
      store16(out + i, v);
    }
  } else {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (x + i >= t.x.n_out) continue;
      store_raw(tile_pixel<T>(p, t, x + i, y) + plane,
                static_cast<Bits>(table_bits<T>(p, channel, byte[i])));
    }
  }
}

// Sixteen bytes of one output row: of one channel in the last pass, of packed pixels in the first.
template <typename T, bool kLast, bool kAligned>
IVR_DEVICE void resample_along_y(const PreprocessParams& p, const PreprocessTarget& t,
                                 const MidPicture& mid, int thread) {
  const int vectors = static_cast<int>(mid.pitch / 16), rows = static_cast<int>(t.y.n_out);
  const int at = thread % vectors * 16, line = thread / vectors;
  const int channel = line / rows, o = line % rows;
  const int count = load_raw<int32_t>(t.y.count + o), first = load_raw<int32_t>(t.y.first + o);
  // Rows between the passes are padded; a row of the picture ends with its last pixel.
  const int64_t step = kLast ? mid.pitch : p.row_stride;
  const uint8_t* from = (kLast ? mid.data + channel * mid.plane : p.image) + first * step + at;
  const int64_t n = kLast ? 16 : 3 * p.W - at;
  int sum[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) sum[j] = 1 << (kResampleBits - 1);
  for (int i = 0; i < count; ++i) {
    const int weight = resample_weight(t.y, o, i);
    const Vec<uint8_t> v = read_bytes < kLast || kAligned > (from + i * step, n);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      sum[j] += weight * static_cast<int>(v.words[j / 4] >> (8 * (j % 4)) & 255u);
    }
  }
  uint32_t byte[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) byte[j] = resample_byte(sum[j]);
  if constexpr (kLast) {
    if (at < t.x.n_out) write_values<T, kAligned>(p, t, channel, at, o, byte);
  } else {
    Vec<uint8_t> out{};
#pragma unroll
    for (int j = 0; j < 16; ++j) out.words[j / 4] |= byte[j] << (8 * (j % 4));
    store16(mid.data + o * mid.pitch + at, out);
  }
}

// What a block does; the kernel's whole body, also under emulation.
template <typename T, bool kAlongY, bool kLast, bool kAligned>
IVR_DEVICE void preprocess_block(const PreprocessParams& p, const PreprocessTarget& t,
                                 const PreprocessPass& pass) {
  const int64_t thread = int64_t{blockIdx.x} * kPreprocessThreads + threadIdx.x;
  if (thread >= pass.threads) return;
  if constexpr (kAlongY) {
    resample_along_y<T, kLast, kAligned>(p, t, pass.mid, static_cast<int>(thread));
  } else {
    resample_along_x<T, kLast>(p, t, pass.mid, static_cast<int>(thread));
  }
}

}  // namespace ivr::cuda
