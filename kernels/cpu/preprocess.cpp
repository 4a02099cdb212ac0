// preprocess on the CPU. See kernels/preprocess.h for the contract.
//
// Both passes are one operation: an output line is a weighted sum of neighbouring input lines, byte
// by byte. In the vertical pass a line is a row of the picture. In the horizontal pass 64 rows are
// transposed first, so that a line is one pixel column, three channels of 64 rows; the result is
// transposed back. Nothing is ever summed across a vector, no lane is wasted on the three channels,
// and the transposed rows serve the grid and the thumbnail alike.
//
// Two lines a and b are interleaved to 16-bit pairs (a, b), so one multiply-add instruction does
// two taps; with the weights in two digits that is two of them per 32-bit sum, and the sum is
// exact.
//
// Only instructions with the same meaning in every 128-bit lane are used: the same text serves SSE2
// (the x86-64 baseline), AVX2, AVX-512BW and NEON; elsewhere a vector is a struct of 16 bytes.
#include "kernels/preprocess.h"

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(IVR_NEON)
#include <arm_neon.h>
#endif

namespace ivr {
namespace {

#if defined(__AVX512BW__)

using Vec = __m512i;
inline Vec load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint8_t* p, Vec a) { _mm512_storeu_si512(p, a); }
inline Vec zero() { return _mm512_setzero_si512(); }
inline Vec broadcast(int32_t a) { return _mm512_set1_epi32(a); }
inline Vec low_bytes(Vec a, Vec b) { return _mm512_unpacklo_epi8(a, b); }
inline Vec high_bytes(Vec a, Vec b) { return _mm512_unpackhi_epi8(a, b); }
inline Vec multiply_add(Vec sum, Vec a, Vec b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
inline Vec round_shift(Vec hi, Vec lo) {
  // Vector operators: gcc 12 warns about its own AVX-512 shift intrinsics.
  const __v16si sum = ((__v16si)hi << kResampleDigitBits) + (__v16si)lo;
  return (Vec)(sum >> kResampleBits);
}
inline Vec narrow(Vec a, Vec b, Vec c, Vec d) {
  return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}
inline __m128i load_lane(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline void store_lane(uint8_t* p, __m128i a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a);
}
inline Vec gather_lanes(const uint8_t* const* p, int64_t step, int64_t at) {
  Vec a = _mm512_castsi128_si512(load_lane(p[0] + at));
  a = _mm512_inserti32x4(a, load_lane(p[step] + at), 1);
  a = _mm512_inserti32x4(a, load_lane(p[2 * step] + at), 2);
  return _mm512_inserti32x4(a, load_lane(p[3 * step] + at), 3);
}
inline void scatter_lanes(uint8_t* const* p, int64_t step, int64_t at, Vec a) {
  store_lane(p[0] + at, _mm512_castsi512_si128(a));
  store_lane(p[step] + at, _mm512_extracti32x4_epi32(a, 1));
  store_lane(p[2 * step] + at, _mm512_extracti32x4_epi32(a, 2));
  store_lane(p[3 * step] + at, _mm512_extracti32x4_epi32(a, 3));
}

#elif defined(__AVX2__)

using Vec = __m256i;
inline Vec load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store(uint8_t* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline Vec zero() { return _mm256_setzero_si256(); }
inline Vec broadcast(int32_t a) { return _mm256_set1_epi32(a); }
inline Vec low_bytes(Vec a, Vec b) { return _mm256_unpacklo_epi8(a, b); }
inline Vec high_bytes(Vec a, Vec b) { return _mm256_unpackhi_epi8(a, b); }
inline Vec multiply_add(Vec sum, Vec a, Vec b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
inline Vec round_shift(Vec hi, Vec lo) {
  return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(hi, kResampleDigitBits), lo),
                           kResampleBits);
}
inline Vec narrow(Vec a, Vec b, Vec c, Vec d) {
  return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
inline __m128i load_lane(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline void store_lane(uint8_t* p, __m128i a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a);
}
inline Vec gather_lanes(const uint8_t* const* p, int64_t step, int64_t at) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load_lane(p[0] + at)),
                                 load_lane(p[step] + at), 1);
}
inline void scatter_lanes(uint8_t* const* p, int64_t step, int64_t at, Vec a) {
  store_lane(p[0] + at, _mm256_castsi256_si128(a));
  store_lane(p[step] + at, _mm256_extracti128_si256(a, 1));
}

#elif defined(__SSE2__)

using Vec = __m128i;
inline Vec load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store(uint8_t* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
inline Vec zero() { return _mm_setzero_si128(); }
inline Vec broadcast(int32_t a) { return _mm_set1_epi32(a); }
inline Vec low_bytes(Vec a, Vec b) { return _mm_unpacklo_epi8(a, b); }
inline Vec high_bytes(Vec a, Vec b) { return _mm_unpackhi_epi8(a, b); }
inline Vec multiply_add(Vec sum, Vec a, Vec b) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
inline Vec round_shift(Vec hi, Vec lo) {
  return _mm_srai_epi32(_mm_add_epi32(_mm_slli_epi32(hi, kResampleDigitBits), lo), kResampleBits);
}
inline Vec narrow(Vec a, Vec b, Vec c, Vec d) {
  return _mm_packus_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d));
}
inline Vec gather_lanes(const uint8_t* const* p, int64_t, int64_t at) { return load(p[0] + at); }
inline void scatter_lanes(uint8_t* const* p, int64_t, int64_t at, Vec a) { store(p[0] + at, a); }

#elif defined(IVR_NEON)

using Vec = uint8x16_t;
inline Vec load(const uint8_t* p) { return vld1q_u8(p); }
inline void store(uint8_t* p, Vec a) { vst1q_u8(p, a); }
inline Vec zero() { return vdupq_n_u8(0); }
inline Vec broadcast(int32_t a) { return (Vec)vdupq_n_s32(a); }
inline Vec low_bytes(Vec a, Vec b) { return vzip1q_u8(a, b); }
inline Vec high_bytes(Vec a, Vec b) { return vzip2q_u8(a, b); }
inline Vec multiply_add(Vec sum, Vec a, Vec b) {
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
  return (Vec)((int32x4_t)sum + vpaddq_s32(low, vmull_high_s16(x, y)));
}
inline Vec round_shift(Vec hi, Vec lo) {
  return (Vec)((((int32x4_t)hi << kResampleDigitBits) + (int32x4_t)lo) >> kResampleBits);
}
inline Vec narrow(Vec a, Vec b, Vec c, Vec d) {
  const auto words = [](Vec x, Vec y) {
    return vcombine_s16(vqmovn_s32((int32x4_t)x), vqmovn_s32((int32x4_t)y));
  };
  return vcombine_u8(vqmovun_s16(words(a, b)), vqmovun_s16(words(c, d)));
}
inline Vec gather_lanes(const uint8_t* const* p, int64_t, int64_t at) { return load(p[0] + at); }
inline void scatter_lanes(uint8_t* const* p, int64_t, int64_t at, Vec a) { store(p[0] + at, a); }

#else

// The same operations on 16 bytes, for machines without any of the above.
union Vec {
  uint8_t u8[16];
  int16_t i16[8];
  int32_t i32[4];
};
inline Vec load(const uint8_t* p) {
  Vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline void store(uint8_t* p, Vec a) { std::memcpy(p, &a, sizeof a); }
inline Vec broadcast(int32_t value) {
  Vec a;
  for (int32_t& x : a.i32) x = value;
  return a;
}
inline Vec zero() { return broadcast(0); }
inline Vec low_bytes(Vec a, Vec b) {
  Vec c;
  for (int i = 0; i < 8; ++i) c.u8[2 * i] = a.u8[i], c.u8[2 * i + 1] = b.u8[i];
  return c;
}
inline Vec high_bytes(Vec a, Vec b) {
  Vec c;
  for (int i = 0; i < 8; ++i) c.u8[2 * i] = a.u8[8 + i], c.u8[2 * i + 1] = b.u8[8 + i];
  return c;
}
inline Vec multiply_add(Vec sum, Vec a, Vec b) {
  for (int i = 0; i < 4; ++i)
    sum.i32[i] += a.i16[2 * i] * b.i16[2 * i] + a.i16[2 * i + 1] * b.i16[2 * i + 1];
  return sum;
}
inline Vec round_shift(Vec hi, Vec lo) {
  for (int i = 0; i < 4; ++i)
    hi.i32[i] = (hi.i32[i] * (1 << kResampleDigitBits) + lo.i32[i]) >> kResampleBits;
  return hi;
}
inline Vec narrow(Vec a, Vec b, Vec c, Vec d) {
  const Vec parts[4] = {a, b, c, d};
  Vec out;
  for (int i = 0; i < 16; ++i) {
    const int32_t x = parts[i / 4].i32[i % 4];
    out.u8[i] = static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
  }
  return out;
}
inline Vec gather_lanes(const uint8_t* const* p, int64_t, int64_t at) { return load(p[0] + at); }
inline void scatter_lanes(uint8_t* const* p, int64_t, int64_t at, Vec a) { store(p[0] + at, a); }

#endif

constexpr int64_t kVec = sizeof(Vec);
constexpr int64_t kBand = kPreprocessBand;
// Output columns that are transposed back together: 48 lines, three square blocks.
constexpr int64_t kColumns = 16;
// Pixels of an output row that stay in cache between resampling and the table.
constexpr int64_t kSpan = 512;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int32_t weight_pair(const int16_t* w) {
  int32_t pair;
  std::memcpy(&pair, w, sizeof pair);
  return pair;
}

// Exact 32-bit sums of kVec bytes, by weight digit.
struct Sums {
  Vec hi0, hi1, hi2, hi3;
  Vec lo0, lo1, lo2, lo3;

  // Two taps: lines a and b, whose weights are a pair at hi and one at lo.
  void add(Vec a, Vec b, const int16_t* hi, const int16_t* lo) {
    const Vec low = low_bytes(a, b);
    const Vec high = high_bytes(a, b);
    const Vec ab0 = low_bytes(low, zero());
    const Vec ab1 = high_bytes(low, zero());
    const Vec ab2 = low_bytes(high, zero());
    const Vec ab3 = high_bytes(high, zero());
    const Vec w_hi = broadcast(weight_pair(hi));
    const Vec w_lo = broadcast(weight_pair(lo));
    hi0 = multiply_add(hi0, ab0, w_hi);
    hi1 = multiply_add(hi1, ab1, w_hi);
    hi2 = multiply_add(hi2, ab2, w_hi);
    hi3 = multiply_add(hi3, ab3, w_hi);
    lo0 = multiply_add(lo0, ab0, w_lo);
    lo1 = multiply_add(lo1, ab1, w_lo);
    lo2 = multiply_add(lo2, ab2, w_lo);
    lo3 = multiply_add(lo3, ab3, w_lo);
  }
};

// out[0, kVec) = the weighted sum of `count` lines, `pitch` bytes apart.
inline void resample_vector(const uint8_t* line, int64_t pitch, const int16_t* hi,
                            const int16_t* lo, int64_t count, uint8_t* out) {
  const Vec none = zero();
  const Vec half = broadcast(1 << (kResampleBits - 1));
  Sums sums{none, none, none, none, half, half, half, half};
  for (int64_t pairs = count / 2; pairs > 0; --pairs) {
    sums.add(load(line), load(line + pitch), hi, lo);
    line += 2 * pitch;
    hi += 2;
    lo += 2;
  }
  if (count % 2 != 0) {  // paired with a weight of zero
    const Vec last = load(line);
    sums.add(last, last, hi, lo);
  }
  store(out, narrow(round_shift(sums.hi0, sums.lo0), round_shift(sums.hi1, sums.lo1),
                    round_shift(sums.hi2, sums.lo2), round_shift(sums.hi3, sums.lo3)));
}

// Transposes the 16 x 16 bytes in each 128-bit lane. A round interleaves registers i and i + 8,
// which rotates the 8-bit address (row, column) of a byte by one bit; four rounds swap the two
// halves.
inline void transpose_lanes(Vec (&r)[16]) {
  Vec s[16];
#pragma GCC unroll 2
  for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      s[2 * i] = low_bytes(r[i], r[i + 8]);
      s[2 * i + 1] = high_bytes(r[i], r[i + 8]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[2 * i] = low_bytes(s[i], s[i + 8]);
      r[2 * i + 1] = high_bytes(s[i], s[i + 8]);
    }
  }
}

// lines[i][r] = rows[r][i] for i < bytes; lines has room for a multiple of 16.
void rows_to_lines(const uint8_t* const (&rows)[kBand], int64_t bytes, uint8_t* lines) {
  uint8_t tail[kBand][16];
  const uint8_t* tail_rows[kBand];
  for (int64_t at = 0; at < bytes; at += 16) {
    const uint8_t* const* from = rows;
    int64_t offset = at;
    if (bytes - at < 16) {
      std::memset(tail, 0, sizeof tail);
      for (int64_t r = 0; r < kBand; ++r) {
        std::memcpy(tail[r], rows[r] + at, static_cast<size_t>(bytes - at));
        tail_rows[r] = tail[r];
      }
      from = tail_rows;
      offset = 0;
    }
    for (int64_t r = 0; r < kBand; r += kVec) {
      Vec block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = gather_lanes(from + r + i, 16, offset);
      transpose_lanes(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(lines + (at + i) * kBand + r, block[i]);
    }
  }
}

// rows[r][at + i] = lines[i][r] for i < bytes <= 3 * kColumns.
void lines_to_rows(const uint8_t* lines, int64_t bytes, uint8_t* const (&rows)[kBand], int64_t at) {
  uint8_t tail[kBand][16];
  uint8_t* tail_rows[kBand];
  for (int64_t done = 0; done < bytes; done += 16) {
    uint8_t* const* to = rows;
    int64_t offset = at + done;
    const int64_t left = bytes - done;
    if (left < 16) {
      for (int64_t r = 0; r < kBand; ++r) tail_rows[r] = tail[r];
      to = tail_rows;
      offset = 0;
    }
    for (int64_t r = 0; r < kBand; r += kVec) {
      Vec block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = load(lines + (done + i) * kBand + r);
      transpose_lanes(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) scatter_lanes(to + r + i, 16, offset, block[i]);
    }
    if (left < 16) {
      for (int64_t r = 0; r < kBand; ++r) {
        std::memcpy(rows[r] + at + done, tail[r], static_cast<size_t>(left));
      }
    }
  }
}

// Resamples a transposed band along x and writes it back as rows.
void resample_columns(const ResampleAxis& axis, const uint8_t* lines,
                      uint8_t* const (&rows)[kBand]) {
  alignas(64) uint8_t done[3 * kColumns * kBand] = {};
  for (int64_t begin = 0; begin < axis.n_out; begin += kColumns) {
    const int64_t n = smaller(kColumns, axis.n_out - begin);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t o = begin + i;
      const int16_t* w = axis.weights + o * 2 * axis.taps;
      const uint8_t* line = lines + axis.first[o] * 3 * kBand;
      for (int64_t at = 0; at < 3 * kBand; at += kVec) {
        resample_vector(line + at, 3 * kBand, w, w + axis.taps, axis.count[o],
                        done + i * 3 * kBand + at);
      }
    }
    lines_to_rows(done, 3 * n, rows, 3 * begin);
  }
}

// Row o along y from the caller's picture, where nothing past a row's end may be read.
void resample_source_row(const PreprocessParams& p, const ResampleAxis& axis, int64_t o,
                         uint8_t* out) {
  const int16_t* hi = axis.weights + o * 2 * axis.taps;
  const int16_t* lo = hi + axis.taps;
  const uint8_t* line = p.image + axis.first[o] * p.row_stride;
  const int64_t bytes = 3 * p.W;
  if (bytes >= kVec) {
    for (int64_t at = 0; at < bytes; at += kVec) {
      const int64_t from = smaller(at, bytes - kVec);  // the last vector overlaps the one before
      resample_vector(line + from, p.row_stride, hi, lo, axis.count[o], out + from);
    }
    return;
  }
  for (int64_t at = 0; at < bytes; ++at) {
    int32_t sum = 1 << (kResampleBits - 1);
    for (int64_t i = 0; i < axis.count[o]; ++i) {
      sum += line[i * p.row_stride + at] * (hi[i] * (1 << kResampleDigitBits) + lo[i]);
    }
    sum >>= kResampleBits;
    out[at] = static_cast<uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
  }
}

// Rows past the n-th repeat it: they compute and store the same bytes again.
template <class Byte>
void band_rows(Byte* first, int64_t pitch, int64_t n, Byte* (&rows)[kBand]) {
  for (int64_t r = 0; r < kBand; ++r) rows[r] = first + smaller(r, n - 1) * pitch;
}

// A band of source rows for every target whose horizontal pass comes first.
void source_band(const PreprocessParams& p, int64_t y, uint8_t* lines) {
  const int64_t n = smaller(kBand, p.H - y);
  const uint8_t* image = p.image + y * p.row_stride;
  bool transposed = false;
  for (int64_t i = 0; i < p.n_targets; ++i) {
    const PreprocessTarget& t = p.targets[i];
    if (t.vertical_first) continue;
    const int64_t pitch = 3 * t.x.n_out;
    uint8_t* mid = t.mid + y * pitch;
    if (t.x.n_in == t.x.n_out) {
      for (int64_t r = 0; r < n; ++r) {
        std::memcpy(mid + r * pitch, image + r * p.row_stride, static_cast<size_t>(pitch));
      }
      continue;
    }
    if (!transposed) {
      const uint8_t* rows[kBand];
      band_rows(image, p.row_stride, n, rows);
      rows_to_lines(rows, 3 * p.W, lines);
      transposed = true;
    }
    uint8_t* rows[kBand];
    band_rows(mid, pitch, n, rows);
    resample_columns(t.x, lines, rows);
  }
}

// n pixels through the table into the three planes of a tile.
template <class T>
void emit(const uint8_t* bytes, int64_t n, const T* table, T* red, int64_t plane) {
  T* green = red + plane;
  T* blue = green + plane;
  for (int64_t i = 0; i < n; ++i) {
    red[i] = table[bytes[3 * i]];
    green[i] = table[256 + bytes[3 * i + 1]];
    blue[i] = table[512 + bytes[3 * i + 2]];
  }
}

template <class T>
void output_band(const PreprocessParams& p, const PreprocessTarget& t, int64_t begin,
                 uint8_t* scratch) {
  const int64_t S = p.S, plane = S * S;
  const int64_t n = smaller(kBand, t.y.n_out - begin);
  const T* table = static_cast<const T*>(p.table);
  const int64_t width = 3 * t.x.n_out;
  uint8_t* band = scratch;
  if (t.vertical_first) {
    uint8_t* lines = scratch + kBand * width;
    const uint8_t* from[kBand];
    uint8_t* to[kBand];
    band_rows(const_cast<const uint8_t*>(t.mid) + begin * 3 * t.x.n_in, 3 * t.x.n_in, n, from);
    band_rows(band, width, n, to);
    rows_to_lines(from, 3 * t.x.n_in, lines);
    resample_columns(t.x, lines, to);
  }
  alignas(64) uint8_t span[3 * kSpan];
  for (int64_t o = begin; o < begin + n; ++o) {
    const int16_t* w = t.y.weights + o * 2 * t.y.taps;
    const uint8_t* line = t.mid + t.y.first[o] * width;
    T* row = static_cast<T*>(t.out) + o / S * t.columns * 3 * plane + o % S * S;
    for (int64_t column = 0; column < t.columns; ++column) {
      for (int64_t x = 0; x < S; x += kSpan) {
        const int64_t pixels = smaller(kSpan, S - x);
        const int64_t from = (column * S + x) * 3;
        const uint8_t* bytes = span;
        if (t.vertical_first) {
          bytes = band + (o - begin) * width + from;
        } else {
          for (int64_t at = 0; at < 3 * pixels; at += kVec) {
            resample_vector(line + from + at, width, w, w + t.y.taps, t.y.count[o], span + at);
          }
        }
        emit(bytes, pixels, table, row + column * 3 * plane + x, plane);
      }
    }
  }
}

}  // namespace

namespace IVR_ISA {

void preprocess_first(const PreprocessParams& p, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t source = preprocess_source_blocks(p);
  for (int64_t block = begin; block < end; ++block) {
    if (block < source) {
      source_band(p, block * kBand, scratch);
      continue;
    }
    int64_t band = block - source;
    for (int64_t i = 0; i < p.n_targets; ++i) {
      const PreprocessTarget& t = p.targets[i];
      if (!t.vertical_first) continue;
      if (band < preprocess_bands(t.y.n_out)) {
        const int64_t stop = smaller((band + 1) * kBand, t.y.n_out);
        for (int64_t o = band * kBand; o < stop; ++o) {
          resample_source_row(p, t.y, o, t.mid + o * 3 * p.W);
        }
        break;
      }
      band -= preprocess_bands(t.y.n_out);
    }
  }
}

void preprocess_second(const PreprocessParams& p, int64_t begin, int64_t end, uint8_t* scratch) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t grid = preprocess_bands(p.targets[0].y.n_out);
    const PreprocessTarget& t = p.targets[block < grid ? 0 : 1];
    const int64_t row = (block < grid ? block : block - grid) * kBand;
    if (p.dtype == DType::bf16) {
      output_band<uint16_t>(p, t, row, scratch);
    } else {
      output_band<float>(p, t, row, scratch);
    }
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
