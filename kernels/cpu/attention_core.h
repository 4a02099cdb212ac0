// The CPU attention of flash_attention and paged_attention.
//
// An item (kernels/attention.h) holds its queries packed and its outputs in scratch memory and
// walks the keys in chunks of 256 absolute positions. A chunk's K is transposed and V widened to
// fp32, or put into pairs of keys, once; then blocks of kRows rows meet it: scores (register tiles
// of rows x keys), softmax in place, scores x V (register tiles of rows x dims) merged into the
// outputs. With dot products of bf16 pairs the weights of V are rounded to bf16, their sum is not.
// The block of scores stays in L1, everything else in L2. The few rows of a decode step take K
// panel by panel through L1 and V where it lies instead, and are bound by memory: V is fetched
// while K is transposed, the next chunk's K while V is multiplied. Multiply-adds: 2 * D per score;
// memory traffic: q and out once, K and V once per item.
//
// Matrix tiles (IVR_TILES) find their operands in the same packed pairs: 16 words of d by 16 keys,
// and 16 pairs of keys by 16 dims. A block is two tiles of rows; a decode step is no other case.
// The softmax of a block, vector work of twice the time of its products, runs between the products
// of its neighbours: a second block of scores.
//
// What is masked never enters: masked scores are replaced, not multiplied, keys outside of
// [first, end) are not read, and where a chunk's V holds infinities or NaN each row meets the
// values that it sees alone, others zero. A masked key adds 0 * v = 0 to a chain, which changes no
// bit of it: so a row's bits do not depend on the other rows of its block.
#pragma once

#include "kernels/attention.h"
#if defined(IVR_TILES)
#include "kernels/cpu/amx.h"
#else
#include "kernels/cpu/simd.h"
#endif

namespace ivr {
namespace {

constexpr int kChunk = static_cast<int>(kAttentionChunk);
constexpr int kPanel = 64;                 // keys that lie together in transposed K
constexpr int kScoreStride = kChunk + 16;  // a power of two would put all rows in one cache set
constexpr int kTile = 16;                  // rows of a matrix tile, words of a row
#if defined(IVR_TILES)
constexpr bool kOnTiles = true;
constexpr int kRows = 2 * kTile;
constexpr int kScoreBlocks = 2;
#else
constexpr bool kOnTiles = false;
// Rows x 2 vectors of accumulators, 2 vectors of K or V and a broadcast fill the register file.
// NEON multiplies by a lane of a vector: broadcasts take three registers there.
constexpr int kRows = kLanes == 16 ? 14 : kRegisters == 32 ? 10 : kLanes == 8 ? 6 : 4;
constexpr int kScoreBlocks = 2;
#endif
constexpr int kAlone = kScoreBlocks * kRows;  // most rows of a query that meets the keys alone
constexpr int kStateStride = kOnTiles ? kRows : 16;  // running max and sum of a block of rows
constexpr float kInfinity = __builtin_inff();

// What is multiplied lies in words of 32 bits: a number, or a pair of bf16 where the instruction
// set has products of pairs: along d for scores, along the keys for values.
template <class T>
constexpr bool kInPairs = false;
#if defined(__AVX512BF16__) || defined(IVR_TILES)
template <>
constexpr bool kInPairs<bf16> = true;
#endif

// Variants that multiply pairs are compiled for bf16 alone: in fp32 they would be AVX-512's.
constexpr bool kTakesF32 = !kInPairs<bf16>;

// Words of a query or a key, and of a packed one: whole tiles, padded with zeros.
template <class T>
constexpr int64_t words_of(int64_t D) {
  return kInPairs<T> ? D / 2 : D;
}
template <class T>
constexpr int64_t packed_words(int64_t D) {
  return kOnTiles ? (words_of<T>(D) + kTile - 1) / kTile * kTile : words_of<T>(D);
}
// The steps of value_tile over keys [begin, end).
template <class T>
constexpr int first_step(int begin) {
  return kOnTiles ? begin / 2 / kTile * kTile : kInPairs<T> ? begin / 2 : begin;
}
template <class T>
constexpr int end_step(int end) {
  return kOnTiles ? (end + 2 * kTile - 1) / (2 * kTile) * kTile : kInPairs<T> ? (end + 1) / 2 : end;
}

inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The keys of a chunk that a row sees: [first, end) and [0, prefix), relative to the chunk.
struct Visible {
  int first, end, prefix;
  bool any() const { return first < end || prefix > 0; }
  bool has(int key) const { return key < prefix || (key >= first && key < end); }
  bool operator==(const Visible&) const = default;
};

template <class T>
inline F load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}

#if defined(__AVX512F__)
// n dims of two keys' values, in pairs.
template <class T>
inline F load_value_pair(const T* even, const T* odd, int64_t n) {
  const __mmask16 some = lanes(n < kLanes ? n : kLanes);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, odd));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
// The same of 2 * kLanes dims, quicker, but for their order: 0 to 3, 8 to 11, ... in the first.
template <class T>
inline void load_value_pairs(const T* even, const T* odd, F* x) {
  const __m512i low = _mm512_loadu_si512(even), high = _mm512_loadu_si512(odd);
  x[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  x[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}
inline void order_value_pairs(F* x) {
  const __m512 a = x[0].v, b = x[1].v;
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  x[0].v = _mm512_permutex2var_ps(a, first, b);
  x[1].v = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
}
#endif

// The bits of a step's words that belong to visible keys.
template <bool Pairwise>
inline uint32_t visible_bits(const Visible& see, int step) {
  if (!Pairwise) return see.has(step) ? ~0u : 0u;
  return (see.has(2 * step) ? 0xffffu : 0u) | (see.has(2 * step + 1) ? 0xffff0000u : 0u);
}
template <bool Pairwise>
inline F keep_bits(F x, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (Pairwise) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(bits));
    return {_mm512_and_ps(x.v, _mm512_castsi512_ps(mask))};
  }
#endif
  return bits ? x : set(0.0f);
}

// NaN for infinities and NaN, else 0.
template <bool Pairwise>
inline F not_finite(F x) {
#if defined(__AVX512F__)
  if constexpr (Pairwise) {
    const __m512i u = _mm512_castps_si512(x.v);
    const F even = {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
    const F odd = {_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(~0xffff)))};
    return (even - even) + (odd - odd);
  }
#endif
  return x - x;
}

template <bool Pairwise>
inline F multiply_words(F a, F b, F c) {
#if defined(__AVX512BF16__)
  if constexpr (Pairwise) return dot_pairs(as_pairs(a), as_pairs(b), c);
#endif
  return fma(a, b, c);
}

// S[r][key] = sum over words of q[word][r] * k[word][key], one chain per score.
template <bool Pairwise, int R, int V>
inline void score_tile(const float* q, const float* k, int64_t words, float* s) {
  F acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) acc[r][i] = set(0.0f);
  }
  for (int64_t w = 0; w < words; ++w, q += R, k += kPanel) {
    F x[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) x[i] = load(k + i * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F a = set(q[r]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) acc[r][i] = multiply_words<Pairwise>(a, x[i], acc[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(s + r * kScoreStride + i * kLanes, acc[r][i]);
  }
}

// How a block's output takes in a chunk: o = o * keep + chunk * take. Rows that see no key of the
// chunk stay as they are.
struct Merge {
  float keep[kStateStride], take[kStateStride];
  bool live[kStateStride];

  Merge() = default;
  // Of row r of a block, alone.
  Merge(const Merge& block, int r) : keep{block.keep[r]}, take{block.take[r]}, live{true} {}
  void add(int r, F chunk, float* o) const {
    store(o, fma(chunk, set(take[r]), load(o) * set(keep[r])));
  }
};

// Values as value_tile multiplies them: a step is a key, or a pair of keys where the instruction
// set has dot products of pairs (weights are rounded to bf16 then). V vectors of dims from d on, of
// which the last has n, in an order of the values' own until they are products.
struct PackedValues {
  const float* v;
  int64_t wide;
  template <int V>
  void load_step(int step, int64_t d, int64_t, F (&x)[V]) const {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) x[i] = load(v + step * wide + d + i * kLanes);
  }
  template <int V>
  void order(F (&)[V]) const {}
};

// Where the values of a chunk's keys lie: those of keys that are not there are zeros.
template <class T>
struct ValuesInPlace {
  alignas(64) static constexpr T kZeros[kAttentionMaxHeadDim] = {};
  static constexpr int kKeys = kInPairs<T> ? 2 : 1;  // of a step
  const T* rows[kChunk];
  const T* next[kChunk];  // rows of keys that are fetched meanwhile, if there are any
  bool fetches = false;

  template <class Keys>
  ValuesInPlace(const Keys& keys, int64_t chunk, int begin, int end) {
    for (int key = first_step<T>(begin) * kKeys; key < end_step<T>(end) * kKeys; ++key) {
      rows[key] = key >= begin && key < end ? keys.v(chunk + key) : kZeros;
    }
  }

  // From now on a chunk of keys from `first` on, of those before `end`, is fetched meanwhile.
  template <class Keys>
  void fetch_keys(const Keys& keys, int64_t first, int64_t end) {
    fetches = first < end;
    for (int key = 0; fetches && key < kChunk; ++key) {
      next[key] = keys.k(first + key < end ? first + key : first);
    }
  }
  // The cache lines that begin in dims [d, d + dims).
  template <int dims>
  void fetch(int step, int64_t d) const {
    constexpr int kLine = 64 / sizeof(T);
    if (dims < kLine && d % kLine != 0) return;
#pragma GCC unroll 4
    for (int i = 0; i < dims; i += kLine) {
      for (int j = 0; j < kKeys; ++j) __builtin_prefetch(next[step * kKeys + j] + d + i, 0, 2);
    }
  }
  F at(int step, int64_t d, int64_t n) const {
    if constexpr (kInPairs<T>) {
      return load_value_pair(rows[2 * step] + d, rows[2 * step + 1] + d, n);
    } else {
      return load_some(rows[step] + d, n);
    }
  }
  template <int V>
  void load_step(int step, int64_t d, int64_t n, F (&x)[V]) const {
    if (fetches) fetch<V * kLanes>(step, d);
    if constexpr (kInPairs<T> && V % 2 == 0) {
#pragma GCC unroll 2
      for (int i = 0; i < V; i += 2) {
        const int64_t at = d + i * kLanes;
        load_value_pairs(rows[2 * step] + at, rows[2 * step + 1] + at, x + i);
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) x[i] = at(step, d + i * kLanes, i < V - 1 ? kLanes : n);
    }
  }
  template <int V>
  void order(F (&x)[V]) const {
    if constexpr (kInPairs<T> && V % 2 == 0) {
      for (int i = 0; i < V; i += 2) order_value_pairs(x + i);
    }
  }
};

// o[r][dim] <- merge of o and the sum over steps of p[r][step] * v[step][dim], one chain per
// element, for V vectors of dims from d on; the last has n dims.
template <bool Pairwise, int R, int V, class Values>
inline void value_tile(const float* p, const Values& values, int64_t d, int64_t n, int64_t wide,
                       int begin, int end, const Merge& merge, float* o) {
  F acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) acc[r][i] = set(0.0f);
  }
  for (int step = begin; step < end; ++step) {
    F x[V];
    values.load_step(step, d, n, x);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F a = set(p[r * kScoreStride + step]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) acc[r][i] = multiply_words<Pairwise>(a, x[i], acc[r][i]);
    }
  }
  o += d;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, o += wide) {
    if (!merge.live[r]) continue;
    values.order(acc[r]);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) merge.add(r, acc[r][i], o + i * kLanes);
  }
}

// Few rows take four vectors at once: more independent chains, fewer broadcasts.
constexpr int kFewRows = kLanes == 16 ? 7 : kRegisters == 32 ? 5 : 3;
template <int R>
constexpr int kVectors = R <= kFewRows ? 4 : 2;

template <bool Pairwise, int R>
void scores_of(int rows, const float* q, const float* k, int64_t words, int begin, int end,
               float* s) {
  if (rows == R) {
    constexpr int V = kVectors<R>;
    for (int key = begin / kPanel * kPanel; key < end; key += V * kLanes) {
      const float* panel = k + (key / kPanel) * kPanel * words + key % kPanel;
      score_tile<Pairwise, R, V>(q, panel, words, s + key);
    }
  } else if constexpr (R > 1) {
    scores_of<Pairwise, R - 1>(rows, q, k, words, begin, end, s);
  }
}

// D: the dims that values have; o has `wide` of them. begin, end: steps.
template <bool Pairwise, int R, class Values>
void values_of(int rows, const float* p, const Values& values, int64_t D, int64_t wide, int begin,
               int end, const Merge& merge, float* o) {
  if (rows == R) {
    constexpr int V = kVectors<R>;
    int64_t d = 0;
    for (; d + V * kLanes <= D; d += V * kLanes) {
      value_tile<Pairwise, R, V>(p, values, d, kLanes, wide, begin, end, merge, o);
    }
    for (; d < D; d += kLanes) {
      const int64_t n = D - d < kLanes ? D - d : kLanes;
      value_tile<Pairwise, R, 1>(p, values, d, n, wide, begin, end, merge, o);
    }
  } else if constexpr (R > 1) {
    values_of<Pairwise, R - 1>(rows, p, values, D, wide, begin, end, merge, o);
  }
}

// The two products of a block of rows with a chunk that is packed. With tiles a share of other work
// may be given, which is done at each of their steps.
#if defined(IVR_TILES)
template <class T>
class Products {
 public:
  static int64_t score_steps(int64_t words, int begin, int end) {
    return (end - begin / kColumns * kColumns + kColumns - 1) / kColumns * (words / kTile);
  }
  static int64_t value_steps(int64_t wide, int begin, int end) {
    return (wide + kColumns - 1) / kColumns * ((end - begin) / kTile);
  }

  template <class... Share>
  void scores(int rows, const float* q, const float* k, int64_t words, int begin, int end, float* s,
              Share&... share) {
    for (int key = begin / kColumns * kColumns; key < end; key += kColumns) {
      const float* panel = k + key / kPanel * kPanel * words + key % kPanel;
      multiply(rows > kTile, true, q, words, panel, kPanel, words, s + key, kScoreStride, share...);
    }
  }
  template <class... Share>
  void values(int rows, const float* p, const float* v, int64_t wide, int begin, int end,
              const Merge& merge, float* o, Share&... share) {
    alignas(64) float sums[kRows * kColumns];
    for (int64_t d = 0; d < wide; d += kColumns) {
      const bool right = wide - d > kTile;
      multiply(rows > kTile, right, p + begin, kScoreStride, v + begin * wide + d, wide,
               end - begin, sums, kColumns, share...);
      for (int r = 0; r < rows; ++r) {
        if (!merge.live[r]) continue;
        for (int64_t i = 0; i < (right ? kColumns : kTile); i += kLanes) {
          merge.add(r, load(sums + r * kColumns + i), o + r * wide + d + i);
        }
      }
    }
  }

 private:
  static constexpr int kColumns = 2 * kTile;

  // c = a b: one tile of rows or two (low), one of columns or two (right). a: words of bf16 pairs;
  // b: [words][columns] of them. Rows of a that are not there may hold anything: a row of c has
  // nothing but its own. A share stands in the middle of a step, where the least has to be waited
  // for before it and behind it.
  template <class... Share>
  void multiply(bool low, bool right, const float* a, int64_t a_m, const float* b, int64_t b_w,
                int64_t words, float* c, int64_t c_m, Share&... share) {
    tiles_.zero<0>();
    tiles_.zero<1>();
    tiles_.zero<2>();
    tiles_.zero<3>();
    for (int64_t w = 0; w < words; w += kTile, a += kTile, b += kTile * b_w) {
      tiles_.load<4>(a, a_m * 4);
      tiles_.load<6>(b, b_w * 4);
      if (right) tiles_.load<7>(b + kTile, b_w * 4);
      tiles_.multiply<0, 4, 6>();
      if (low) tiles_.load<5>(a + kTile * a_m, a_m * 4);
      if (right) tiles_.multiply<1, 4, 7>();
      (share(), ...);
      if (low) tiles_.multiply<2, 5, 6>();
      if (low && right) tiles_.multiply<3, 5, 7>();
    }
    float* c_low = c + kTile * c_m;
    tiles_.store<0>(c, c_m * 4);
    if (right) tiles_.store<1>(c + kTile, c_m * 4);
    if (low) tiles_.store<2>(c_low, c_m * 4);
    if (low && right) tiles_.store<3>(c_low + kTile, c_m * 4);
  }

  Tiles tiles_;
};
#else
template <class T>
struct Products {
  void scores(int rows, const float* q, const float* k, int64_t words, int begin, int end,
              float* s) {
    scores_of<kInPairs<T>, kRows>(rows, q, k, words, begin, end, s);
  }
  void values(int rows, const float* p, const float* v, int64_t wide, int begin, int end,
              const Merge& merge, float* o) {
    values_of<kInPairs<T>, kRows>(rows, p, PackedValues{v, wide}, wide, wide, begin, end, merge, o);
  }
};
#endif

// A bit for each of the keys [key, key + 64) that is visible.
inline uint64_t visible_keys(const Visible& see, int key) {
  const auto before = [key](int end) {
    return end <= key ? 0 : end >= key + 64 ? ~uint64_t{0} : (uint64_t{1} << (end - key)) - 1;
  };
  return (before(see.end) & ~before(see.first)) | before(see.prefix);
}

// Four vectors of keys from `key` on: `other` in the lanes of those that are not visible.
constexpr int kStep = 4 * kLanes;
inline void replace_masked(const Visible& see, int key, F other, F (&x)[4]) {
  if (key >= see.first && key + kStep <= see.end) return;
  const uint64_t visible = visible_keys(see, key);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = select_bits(static_cast<uint32_t>(visible >> i * kLanes), x[i], other);
  }
}

// factor * the largest of a row's visible scores in [begin, end) (multiples of 4 vectors), of which
// all are visible unless Masked. Not inlined, nor is weigh: few instructions besides those on
// vectors count beside tiles, and the compiler keeps that in small functions only.
template <bool Masked>
[[gnu::noinline]] float largest_score(const float* s, int begin, int end, const Visible& see,
                                      float factor) {
  const F lowest = set(-kInfinity);
  F m[4] = {lowest, lowest, lowest, lowest};
  for (int key = begin; key < end; key += kStep) {
    F x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = load(s + key + i * kLanes);
    if constexpr (Masked) replace_masked(see, key, lowest, x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) m[i] = ivr::max(x[i], m[i]);
  }
  return largest(ivr::max(ivr::max(m[0], m[1]), ivr::max(m[2], m[3]))) * factor;
}

// Turns scores of [begin, end) (multiples of 4 vectors) into 2^(factor * s - max), 0 where masked;
// pairwise rounded to bf16, one next to the other from s on. Returns their sum, in four
// accumulators of a fixed pattern: it does not depend on begin and end.
template <bool Pairwise, bool Masked>
[[gnu::noinline]] float weigh(float* s, int begin, int end, const Visible& see, float factor,
                              float max) {
  const F zero = set(0.0f), scale = set(factor), shift = set(-max);
  F total[4] = {zero, zero, zero, zero};
  float* to = Pairwise ? s + begin / 2 : s + begin;
  for (int key = begin; key < end; key += kStep) {
    const float* at = s + key;
    F x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      x[i] = exp2_small<Pairwise>(fma(load(at + i * kLanes), scale, shift));
    if constexpr (Masked) replace_masked(see, key, zero, x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] = total[i] + x[i];
#if defined(__AVX512F__)
    if constexpr (Pairwise) {
      // Half the bytes: what is overwritten has been read.
      store_rounded(to, x[0], x[1]);
      store_rounded(to + kLanes, x[2], x[3]);
      to += kStep / 2;
      continue;
    }
#endif
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(to + i * kLanes, x[i]);
    to += kStep;
  }
  return ivr::sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Loads words [w, w + kLanes) of kLanes rows, zeros beyond the last word and for rows that are
// null, and transposes them.
template <class T>
inline void load_square(const T* const* rows, int64_t w, int64_t words, F (&x)[kLanes]) {
  const int64_t n = words - w;
  for (int i = 0; i < kLanes; ++i) {
    if (!rows[i]) {
      x[i] = set(0.0f);
    } else if constexpr (kInPairs<T>) {
      const float* at = reinterpret_cast<const float*>(rows[i]) + w;
      x[i] = n >= kLanes ? load(at) : load_n(at, n);
    } else {
      x[i] = n >= kLanes ? load(rows[i] + w) : load_n(rows[i] + w, n);
    }
  }
  transpose(x);
}

template <class T>
inline void prefetch_row(const T* row, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(row + d, 0, 2);
}

// Packs keys [begin, end) of a chunk, transposed, into panels [kChunk / kPanel][words][kPanel],
// with zeros around them up to whole squares. Rows may lie far apart (a packed qkv, pages), where
// no hardware prefetcher helps: while a square is transposed, its values and the next keys are
// fetched.
template <class T, class Keys>
void pack_keys(const Keys& keys, int64_t chunk, int begin, int end, int64_t D, float* out) {
  for (int first = begin / kLanes * kLanes; first < end; first += kLanes) {
    const T* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int key = first + i;
      rows[i] = key >= begin && key < end ? keys.k(chunk + key) : nullptr;
      if (rows[i]) prefetch_row(keys.v(chunk + key), D);
      if (key + kLanes < end) prefetch_row(keys.k(chunk + key + kLanes), D);
    }
    const int64_t words = packed_words<T>(D);
    float* panel = out + (first / kPanel) * kPanel * words + first % kPanel;
    for (int64_t w = 0; w < words; w += kLanes) {
      const int n = static_cast<int>(words - w < kLanes ? words - w : kLanes);
      F x[kLanes];
      load_square(rows, w, words_of<T>(D), x);
      for (int i = 0; i < n; ++i) store(panel + (w + i) * kPanel, x[i]);
    }
  }
}

// Packs values [begin, end) of a chunk to rows of `wide` words, one for a step of value_tile, with
// zeros for those that are not visible. Returns whether all are finite.
template <class T, class Keys>
bool pack_values(const Keys& keys, int64_t chunk, int begin, int end, const Visible& see, int64_t D,
                 int64_t wide, float* out) {
  const ValuesInPlace<T> values(keys, chunk, begin, end);
  F probe = set(0.0f);
  for (int step = first_step<T>(begin); step < end_step<T>(end); ++step) {
    const uint32_t bits = visible_bits<kInPairs<T>>(see, step);
    for (int64_t d = 0; d < wide; d += kLanes) {
      const F x = keep_bits<kInPairs<T>>(values.at(step, d, clamp(D - d, 0, kLanes)), bits);
      probe = probe + not_finite<kInPairs<T>>(x);
      store(out + step * wide + d, x);
    }
  }
  return sum(probe) == 0.0f;
}

template <class T, class Keys>
class Attention {
 public:
  // Query i of the sequence stands at position offset + i.
  Attention(const AttentionParams& p, const AttentionItem& item, const Keys& keys, int64_t first_q,
            int64_t q_len, int64_t kv_len, float* scratch)
      : p_(p),
        item_(item),
        keys_(keys),
        first_q_(first_q),
        kv_len_(kv_len),
        offset_(kv_len - q_len),
        prefix_(p.prefix ? p.prefix[item.sequence] : 0),
        n_(item.end_row - item.first_row),
        wide_(attention_padded(p.D)) {
    const int64_t blocks = (n_ + kRows - 1) / kRows;
    k_ = scratch;
    v_ = k_ + kChunk * wide_;
    s_ = v_ + kChunk * wide_;
    max_ = s_ + kScoreBlocks * kRows * kScoreStride;
    sum_ = max_ + blocks * kStateStride;
    o_ = sum_ + blocks * kStateStride;
    q_ = o_ + n_ * wide_;
    for (int64_t i = 0; i < blocks * kStateStride; ++i) {
      max_[i] = -kInfinity;
      sum_[i] = 0.0f;
    }
    memset(o_, 0, static_cast<size_t>(n_ * wide_) * sizeof(float));
    pack_queries();
  }

  void run() {
    const int64_t last = (item_.end_row - 1) / p_.group;
    const int64_t first_key = first_visible(item_.first_row / p_.group);
    int64_t end_key = end_visible(last);
    if (prefix_ > end_key) end_key = prefix_;
    const bool one_query = !kOnTiles && n_ <= kAlone && item_.first_row / p_.group == last;
    for (int64_t chunk = 0; chunk < end_key; chunk += kChunk) {
      if (chunk >= prefix_ && chunk + kChunk <= first_key) continue;
      const int begin = chunk < prefix_ ? 0 : within(first_key - chunk);
      const int end = within(end_key - chunk);
      if (begin >= end) continue;
      if constexpr (!kOnTiles) {
        if (one_query && prefix_ == 0) {
          meet_alone(chunk, begin, end);
          continue;
        }
      }
      pack_keys<T>(keys_, chunk, begin, end, p_.D, k_);
      Chunk packed = {chunk, begin, end, {begin, end, 0}, true};
      packed.finite = pack(packed);
      meet(packed);
    }
    finish();
  }

 private:
  // A chunk whose keys [begin, end) are packed, the values of those that `see` has.
  struct Chunk {
    int64_t at;
    int begin, end;
    Visible see;
    bool finite;
  };
  bool pack(const Chunk& c) {
    return pack_values<T>(keys_, c.at, c.begin, c.end, c.see, p_.D, wide_, v_);
  }

  int64_t end_visible(int64_t query) const {
    return p_.causal ? clamp(offset_ + query + 1, 0, kv_len_) : kv_len_;
  }
  int64_t first_visible(int64_t query) const {
    if (p_.window == kAttentionNoWindow) return 0;
    return clamp(offset_ + query + 1 - p_.window, 0, kv_len_);
  }
  static int within(int64_t key) { return static_cast<int>(clamp(key, 0, kChunk)); }

  int rows_of(int64_t row) const { return static_cast<int>(n_ - row < kRows ? n_ - row : kRows); }

  const T* query(int64_t row) const {
    const int64_t r = item_.first_row + row;
    const int64_t head = item_.kv_head * p_.group + r % p_.group;
    return static_cast<const T*>(p_.q) + (first_q_ + r / p_.group) * p_.q_t + head * p_.q_h;
  }

  // [block][words][rows of the block]; for tiles [row][words]
  void pack_queries() {
    const int64_t words = packed_words<T>(p_.D);
    if constexpr (kOnTiles) {
      const size_t bytes = static_cast<size_t>(p_.D) * sizeof(T);
      for (int64_t row = 0; row < n_; ++row) {
        char* out = reinterpret_cast<char*>(q_ + row * words);
        memcpy(out, query(row), bytes);
        memset(out + bytes, 0, static_cast<size_t>(words) * 4 - bytes);
      }
    } else {
      for (int64_t row = 0; row < n_; row += kRows) {
        const int rows = rows_of(row);
        float* out = q_ + row * words;
        for (int first = 0; first < rows; first += kLanes) {
          const int some = rows - first < kLanes ? rows - first : kLanes;
          const T* q[kLanes];
          for (int r = 0; r < kLanes; ++r) q[r] = r < some ? query(row + first + r) : nullptr;
          for (int64_t w = 0; w < words; w += kLanes) {
            const int n = static_cast<int>(words - w < kLanes ? words - w : kLanes);
            F x[kLanes];
            load_square(q, w, words, x);
            for (int i = 0; i < n; ++i) store_n(out + (w + i) * rows + first, x[i], some);
          }
        }
      }
    }
  }

  // A block of rows and a chunk: the keys that each row sees, all of them in [begin, end); scores,
  // then weights; their maxima and sums, and how those and the output are taken in.
  struct Block {
    int64_t row;
    int rows, begin, end;
    Visible see[kRows];
    float* s;
    float max[kStateStride], sum[kStateStride];
    Merge merge;
  };

  // The first block from `row` on of which a row sees a key of the chunk, or null; `row` is behind
  // it then.
  Block* next_block(const Chunk& chunk, int64_t& row, Block& b) const {
    while (row < n_) {
      b.row = row;
      b.rows = rows_of(row);
      b.begin = kChunk;
      b.end = 0;
      for (int r = 0; r < b.rows; ++r) {
        const int64_t q = (item_.first_row + row + r) / p_.group;
        b.see[r] = {within(first_visible(q) - chunk.at), within(end_visible(q) - chunk.at),
                    within(prefix_ - chunk.at)};
        if (!b.see[r].any()) continue;
        const int first = b.see[r].prefix > 0 ? 0 : b.see[r].first;
        const int last = b.see[r].end > b.see[r].prefix ? b.see[r].end : b.see[r].prefix;
        b.begin = first < b.begin ? first : b.begin;
        b.end = last > b.end ? last : b.end;
      }
      row += kRows;
      if (b.begin < b.end) return &b;
    }
    return nullptr;
  }

  // The blocks of rows meet a chunk.
#if defined(IVR_TILES)
  // One's softmax runs between the products of its neighbours: the values of the block before it,
  // then the scores of the block behind it, which take the same memory.
  void meet(Chunk& chunk) {
    Block blocks[3];
    int64_t row = 0;
    Block *before = nullptr, *now = next_block(chunk, row, blocks[0]);
    if (!now) return;
    now->s = s_;
    scores(*now);
    for (int i = 1; now; ++i) {
      Block* next = next_block(chunk, row, blocks[i % 3]);
      if (next) next->s = s_ + i % 2 * kRows * kScoreStride;
      const auto softmax_of = [&](int64_t r) { softmax(*now, static_cast<int>(r)); };
      Spread rows{now->rows, value_steps(chunk, before) + score_steps(next)};
      auto share = [&] { rows(softmax_of); };
      if (before) values(chunk, *before, share);
      if (next) scores(*next, share);
      rows.finish(softmax_of);
      settle(*now);
      before = now;
      now = next;
    }
    values(chunk, *before);
  }
  // How often the products of a block call a share.
  int64_t score_steps(const Block* b) const {
    return b ? Products<T>::score_steps(packed_words<T>(p_.D), b->begin, b->end) : 0;
  }
  int64_t value_steps(const Chunk& chunk, const Block* b) const {
    if (!b || !chunk.finite) return 0;
    return Products<T>::value_steps(wide_, first_step<T>(b->begin), end_step<T>(b->end));
  }
#else
  void meet(Chunk& chunk) {
    Block b;
    b.s = s_;
    for (int64_t row = 0; next_block(chunk, row, b);) {
      scores(b);
      for (int r = 0; r < b.rows; ++r) softmax(b, r);
      settle(b);
      values(chunk, b);
    }
  }
#endif

  template <class... Share>
  void scores(const Block& b, Share&... share) {
    const int64_t words = packed_words<T>(p_.D);
    products_.scores(b.rows, q_ + b.row * words, k_, words, b.begin, b.end, b.s, share...);
  }

  // Where a chunk is not finite the rows pack its values anew, each for itself: no work to share.
  template <class... Share>
  void values(Chunk& chunk, const Block& b, Share&... share) {
    float* o = o_ + b.row * wide_;
    const int first = first_step<T>(b.begin), last = end_step<T>(b.end);
    if (chunk.finite) {
      products_.values(b.rows, b.s, v_, wide_, first, last, b.merge, o, share...);
      return;
    }
    for (int r = 0; r < b.rows; ++r) {
      if (!b.merge.live[r]) continue;
      if (chunk.see != b.see[r]) {
        chunk.see = b.see[r];
        pack(chunk);
      }
      products_.values(1, b.s + r * kScoreStride, v_, wide_, first, last, Merge(b.merge, r),
                       o + r * wide_);
    }
  }

  // Rows of a single query, which all see the keys [begin, end) of the chunk: a decode step. The
  // few rows are no work to pack for: K passes through one panel that stays in L1, V is read in
  // place. The same chains of additions as in meet.
  void meet_alone(int64_t chunk, int begin, int end) {
    Block blocks[kAlone / kRows];
    const int count = static_cast<int>((n_ + kRows - 1) / kRows);
    for (int i = 0; i < count; ++i) {
      Block& b = blocks[i];
      b.row = i * kRows;
      b.rows = rows_of(b.row);
      b.begin = begin;
      b.end = end;
      b.s = s_ + i * kRows * kScoreStride;
      for (int r = 0; r < b.rows; ++r) b.see[r] = {begin, end, 0};
    }
    const int64_t words = words_of<T>(p_.D);
    for (int key = begin; key < end;) {
      const int panel = key / kPanel * kPanel, to = panel + kPanel < end ? panel + kPanel : end;
      pack_keys<T>(keys_, chunk + panel, key - panel, to - panel, p_.D, k_);
      for (int i = 0; i < count; ++i) {
        const Block& b = blocks[i];
        scores_of<kInPairs<T>, kRows>(b.rows, q_ + b.row * words, k_, words, key - panel,
                                      to - panel, b.s + panel);
      }
      key = to;
    }
    ValuesInPlace<T> values(keys_, chunk, begin, end);
    values.fetch_keys(keys_, chunk + kChunk, kv_len_);
    for (int i = 0; i < count; ++i) {
      Block& b = blocks[i];
      for (int r = 0; r < b.rows; ++r) softmax(b, r);
      settle(b);
      values_of<kInPairs<T>, kRows>(b.rows, b.s, values, p_.D, wide_, first_step<T>(begin),
                                    end_step<T>(end), b.merge, o_ + b.row * wide_);
      values.fetches = false;
    }
  }

  // Scores of row r of a block to weights, rows in ascending order. A row's maximum is found a row
  // ahead: the long chain of operations that it is waits for nothing then, and nothing for it.
  void softmax(Block& b, int r) const {
    if (r == 0) find_maximum(b, 0);
    if (r + 1 < b.rows) find_maximum(b, r + 1);
    const auto run = masked(b, r) ? weigh<kInPairs<T>, true> : weigh<kInPairs<T>, false>;
    b.sum[r] = run(b.s + r * kScoreStride, first_panel(b), end_panel(b), b.see[r],
                   p_.scale * kLog2e, b.max[r]);
  }
  void find_maximum(Block& b, int r) const {
    const auto run = masked(b, r) ? largest_score<true> : largest_score<false>;
    b.max[r] =
        run(b.s + r * kScoreStride, first_panel(b), end_panel(b), b.see[r], p_.scale * kLog2e);
  }
  // The keys of a block's softmax, in whole panels.
  static int first_panel(const Block& b) { return b.begin / kPanel * kPanel; }
  static int end_panel(const Block& b) { return (b.end + kPanel - 1) / kPanel * kPanel; }
  static bool masked(const Block& b, int r) {
    return b.see[r].first > first_panel(b) || b.see[r].end < end_panel(b);
  }

  // Brings the running maxima and sums of a block up to date, after softmax.
  void settle(Block& b) {
    float* max = max_ + b.row / kRows * kStateStride;
    float* sum = sum_ + b.row / kRows * kStateStride;
    float next[kStateStride];
    for (int r = b.rows; r < kStateStride; ++r) b.max[r] = -kInfinity;
    for (int r = 0; r < kStateStride; r += kLanes) {
      const F mine = load(max + r), theirs = load(b.max + r), both = ivr::max(mine, theirs);
      store(next + r, both);
      store(b.merge.keep + r, exp2_small(mine - both));
      store(b.merge.take + r, exp2_small(theirs - both));
    }
    for (int r = 0; r < kStateStride; ++r) {
      b.merge.live[r] = r < b.rows && b.see[r].any();
      if (!b.merge.live[r]) continue;
      max[r] = next[r];
      sum[r] = fma1(b.sum[r], b.merge.take[r], sum[r] * b.merge.keep[r]);
    }
  }

  float sink(int64_t head) const {
    if (!p_.sinks) return -kInfinity;
    return p_.sinks_dtype == DType::f32 ? static_cast<const float*>(p_.sinks)[head]
                                        : to_float(static_cast<const bf16*>(p_.sinks)[head]);
  }

  // Divides by the sum, sinks included, and rounds.
  void finish() {
    for (int64_t row = 0; row < n_; ++row) {
      const int64_t r = item_.first_row + row;
      const int64_t head = item_.kv_head * p_.group + r % p_.group;
      const int64_t state = row / kRows * kStateStride + row % kRows;
      float keep = 1.0f, sum = sum_[state];
      if (p_.sinks) {
        const float logit = sink(head) * kLog2e, max = max_[state];
        const float both = logit > max ? logit : max;
        // A sink of -inf before no keys at all is no weight: the row is zero like any other.
        if (both > -kInfinity || both != both) {
          float e[kLanes], f[kLanes];
          store(e, exp2_small(set(max - both)));
          store(f, exp2_small(set(logit - both)));
          keep = e[0];
          sum = fma1(sum, keep, f[0]);
        }
      }
      T* out = static_cast<T*>(p_.out) + (first_q_ + r / p_.group) * p_.out_t + head * p_.out_h;
      const float* o = o_ + row * wide_;
      // The sum of a row that sees a key is at least about 1; 0 means none.
      const float divisor = sum == 0.0f ? 1.0f : sum;
      for (int64_t d = 0; d < p_.D; d += kLanes) {
        const int64_t n = p_.D - d < kLanes ? p_.D - d : kLanes;
        store_n(out + d, load(o + d) * set(keep) / set(divisor), n);
      }
    }
  }

  const AttentionParams& p_;
  const AttentionItem& item_;
  const Keys& keys_;
  const int64_t first_q_, kv_len_, offset_, prefix_, n_, wide_;
  float *k_, *v_, *s_, *max_, *sum_, *o_, *q_;
  Products<T> products_;
};

}  // namespace
}  // namespace ivr
