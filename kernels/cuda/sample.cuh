// sample on the GPU (contract: kernels/sample.h).
//
// Mapping    a block owns a row; a thread takes four neighbouring tokens at a time, which share one
//            Philox call. The row's logits are read once; what is left of them to do works on the
//            workspace, which stays in L2.
// Top-k      the k-th largest value, five bits of its key per pass: lane b of every warp counts the
//            tokens whose digit is b, by ballots, without atomics.
// Top-p      no threshold is looked for. A token is kept where the weight above it is less than
//            top_p of the whole: the Gumbel winner of all is drawn first and asked, and where it is
//            not kept, everything up to its value is dropped and the next one drawn. That is the
//            draw that filtering first would give, after 1 / top_p tries on average.
// Noise      is compared in float; only tokens within kDoubt of a warp's best are looked at in
//            double, as the CPU does, so that both draw the same token.
// Sums       are in an order that depends on V alone.
// Bytes      B * V * 4; with a temperature that much again for each pass, from L2.
#pragma once

#include <cstdio>

#include "kernels/cuda/places.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/sample.h"

namespace ivr::cuda {

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
// Vectors that a thread has in flight where it computes little: one block is alone on its
// multiprocessor.
constexpr int kSampleBatch = 4;
// Noise lies in [-2.86, 16.64]: a token this far below the largest logit cannot win.
constexpr float kGumbelReach = 20.0f;
// More than twice the error of a score in float.
constexpr float kDoubt = 1e-3f;
// exp(-60) of every token of a vocabulary is nothing beside the largest one's 1, in double.
constexpr double kNoWeight = -60.0;
constexpr uint64_t kBadRow = ~uint64_t{0};

struct SampleConfig {
  bool aligned;  // every row of the logits starts on 16 bytes
};

inline bool sample_supported(const SampleParams& p) {
  return p.B <= kMaxIndex && p.V <= kMaxRow && pointer_aligned(p.workspace) &&
         p.workspace_b % 4 == 0;
}

inline SampleConfig sample_config(const SampleParams& p) {
  return {pointer_aligned(p.logits) && stride_aligned(DType::f32, p.B, p.logits_b)};
}

// `aligned=1 grid=8`; returns what snprintf returns.
inline int format(const SampleConfig& c, const SampleParams& p, char* out, size_t size) {
  return std::snprintf(out, size, "aligned=%d grid=%lld", static_cast<int>(c.aligned),
                       static_cast<long long>(p.B));
}

template <typename F>
void with_sample_kernel(const SampleConfig& c, F&& f) {
  c.aligned ? f.template operator()<true>() : f.template operator()<false>();
}

// ---- device -------------------------------------------------------------------------------------

IVR_DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

// Combines one value of every thread; all get the same bits. scratch: one T per warp.
template <typename T, typename Combine>
IVR_DEVICE T block_reduce(T v, const Combine& combine, Shared<T> scratch) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    v = combine(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) scratch[threadIdx.x / kWarpSize] = v;
  __syncthreads();
  v = scratch[lane];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    v = combine(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  __syncthreads();
  return v;
}

// Tokens at .. at + 3 of a row; -inf behind its end. Of the workspace, whose rows are padded, the
// caller reads with kWhole.
template <bool kAligned, bool kWhole>
IVR_DEVICE Vec<float> read_tokens(const float* row, int at, int V) {
  constexpr uint32_t kNever = 0xff800000u;
  Vec<float> v{{kNever, kNever, kNever, kNever}};
  if (kAligned && (kWhole ? at < V : at + 3 < V)) return load16(row + at);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!kWhole && at + i < V) v.words[i] = load_raw<uint32_t>(row + at + i);
  }
  return v;
}

// f(at, x) for every four tokens of a row. All threads make the same number of calls, the last ones
// perhaps behind the row.
template <int kBatch, bool kAligned, bool kWhole, typename F>
IVR_DEVICE void each_four(const float* row, int V, const F& f) {
  constexpr int kStep = 4 * kSampleThreads;
  for (int base = 4 * static_cast<int>(threadIdx.x), first = 0; first < V;
       base += kBatch * kStep, first += kBatch * kStep) {
    Vec<float> v[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      v[b] = read_tokens<kAligned, kWhole>(row, base + b * kStep, V);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float x[4];
      unpack(v[b], x);
      f(base + b * kStep, x);
    }
  }
}

template <int kBatch, typename F>
IVR_DEVICE void each_four(const float* workspace, int V, const F& f) {
  each_four<kBatch, true, true>(workspace, V, f);
}

// The larger of a best-so-far and a token's place.
IVR_DEVICE uint64_t better(uint64_t best, float x, int token) {
  const uint64_t place = place_of(x, token);
  return place > best ? place : best;
}

struct SampleScratch {
  Shared<uint64_t> places;  // [kSampleWarps]
  Shared<double> sums;      // [kSampleWarps]
  Shared<int> tokens;       // [kSampleWarps]
  Shared<uint32_t> counts;  // [kSampleWarps, 32]
};

IVR_DEVICE uint64_t largest_place(uint64_t place, const SampleScratch& scratch) {
  return block_reduce(place, [](uint64_t a, uint64_t b) { return a > b ? a : b; }, scratch.places);
}

// The k-th largest value of x; -inf where fewer are finite.
IVR_DEVICE float top_k_value(const float* x, int V, int k, const SampleScratch& scratch) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  uint32_t prefix = 0, above = 0;
  for (int shift = 30; shift >= 0; shift -= 5) {
    uint32_t count = 0;  // of this warp's tokens with the prefix and the digit `lane`
    each_four<2>(x, V, [&](int, const float (&v)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t digits = key_of(v[i]) >> shift;
        const bool here = v[i] > negative_infinity() && digits >> 5 == prefix;
        uint32_t mask = __ballot_sync(kFullMask, here);
        if (mask == 0) continue;
#pragma unroll
        for (int bit = 0; bit < 5; ++bit) {
          const uint32_t set = __ballot_sync(kFullMask, digits >> bit & 1u);
          mask &= lane >> bit & 1 ? set : ~set;
        }
        count += static_cast<uint32_t>(count_bits(mask));
      }
    });
    scratch.counts[warp * kWarpSize + lane] = count;
    __syncthreads();
    uint32_t total = 0;
    for (int w = 0; w < kSampleWarps; ++w) total += scratch.counts[w * kWarpSize + lane];
    __syncthreads();
    uint32_t from_here = total;  // and all larger digits
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t larger = __shfl_down_sync(kFullMask, from_here, offset);
      if (lane + offset < kWarpSize) from_here += larger;
    }
    const uint32_t enough = __ballot_sync(kFullMask, above + from_here >= static_cast<uint32_t>(k));
    if (enough == 0) return negative_infinity();
    const int digit = highest_bit(enough);
    above += __shfl_sync(kFullMask, from_here - total, digit);
    prefix = prefix << 5 | static_cast<uint32_t>(digit);
  }
  return value_of(prefix);
}

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): Philox4x32-10.
IVR_DEVICE void philox(uint32_t group, uint64_t index, uint64_t seed, uint32_t (&out)[4]) {
  uint32_t a = group, b = static_cast<uint32_t>(index), c = static_cast<uint32_t>(index >> 32);
  uint32_t d = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{a} * 0xD2511F53u;
    const uint64_t q = uint64_t{c} * 0xCD9E8D57u;
    const uint32_t a2 = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
    const uint32_t c2 = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
    b = static_cast<uint32_t>(q);
    d = static_cast<uint32_t>(p);
    a = a2;
    c = c2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}

// -log(-log(u)) of u = (bits / 2^8 + 1/2) / 2^24.
IVR_DEVICE double gumbel(uint32_t bits) {
  const double u = ((bits >> 8) + 0.5) * 0x1p-24;
  return -log(-log(u));
}

// The same within 1e-5; above 1/2, where u is no float, by 1 - u, which is one.
IVR_DEVICE float rough_gumbel(uint32_t bits) {
  const uint32_t r = bits >> 8;
  const bool low = r < (1u << 23);
  const float u = (static_cast<float>(low ? r : (1u << 24) - 1 - r) + 0.5f) * 0x1p-24f;
  return -logf(-(low ? logf(u) : log1pf(-u)));
}

struct Draw {
  const float* x;  // logits / temperature, padded with -inf
  int V;
  float best;      // the largest of x
  float at_least;  // tokens below have been filtered out
  uint64_t seed, index;
};

// The token above `cut` with the largest noisy value, or the lowest of several; never none, for the
// caller cuts below `best`.
IVR_DEVICE int draw_token(const Draw& d, float cut, const SampleScratch& scratch) {
  const float lowest = fmaxf(d.at_least, d.best - kGumbelReach);
  float reach = negative_infinity();  // the warp's best score so far, relative to d.best
  double high = -1e300;
  int winner = kMaxIndex;
  each_four<1>(d.x, d.V, [&](int at, const float (&x)[4]) {
    bool live[4], any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) any |= live[i] = x[i] >= lowest && x[i] > cut;
    if (__ballot_sync(kFullMask, any) == 0) return;
    uint32_t random[4];
    philox(static_cast<uint32_t>(at) / 4, d.index, d.seed, random);
    float score[4], most = negative_infinity();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[i] = live[i] ? (x[i] - d.best) + rough_gumbel(random[i]) : negative_infinity();
      most = fmaxf(most, score[i]);
    }
    reach = fmaxf(reach, warp_max(most));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(score[i] >= reach - kDoubt)) continue;
      const double exact = x[i] + gumbel(random[i]);
      if (exact > high) {
        high = exact;
        winner = at + i;
      }
    }
  });
  const double highest =
      block_reduce(high, [](double a, double b) { return a > b ? a : b; }, scratch.sums);
  return block_reduce(
      high == highest ? winner : static_cast<int>(kMaxIndex),
      [](int a, int b) { return a < b ? a : b; }, scratch.tokens);
}

// Whether the tokens above `value` weigh less than top_p of all that top-k has kept.
IVR_DEVICE bool within_top_p(const float* x, int V, float best, float at_least, float value,
                             float top_p, const SampleScratch& scratch) {
  double total = 0.0, above = 0.0;
  each_four<1>(x, V, [&](int, const float (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double distance = static_cast<double>(v[i]) - best;
      if (v[i] < at_least || distance < kNoWeight) continue;
      const double weight = exp(distance);
      total += weight;
      if (v[i] > value) above += weight;
    }
  });
  const auto add = [](double a, double b) { return a + b; };
  total = block_reduce(total, add, scratch.sums);
  above = block_reduce(above, add, scratch.sums);
  return above < top_p * total;
}

template <typename T>
IVR_DEVICE T row_parameter(const T* values, int64_t b, T neutral) {
  return values != nullptr ? load_raw<T>(values + b) : neutral;
}

// What a block does; the kernel's whole body, also under emulation.
template <bool kAligned>
IVR_DEVICE void sample_block(const SampleParams& p) {
  IVR_SHARED(uint64_t, places, kSampleWarps);
  IVR_SHARED(double, sums, kSampleWarps);
  IVR_SHARED(int, tokens, kSampleWarps);
  IVR_SHARED(uint32_t, counts, kSampleWarps* kWarpSize);
  const SampleScratch scratch{places, sums, tokens, counts};
  const int64_t b = blockIdx.x;
  const int V = static_cast<int>(p.V);
  const float* logits = p.logits + b * p.logits_b;
  float* x = p.workspace + b * p.workspace_b;
  const auto answer = [&](int64_t token) {
    if (threadIdx.x == 0) store_raw<int64_t>(p.out + b, token);
  };

  const float temperature = row_parameter(p.temperature, b, 0.0f);
  const float penalty = row_parameter(p.repetition_penalty, b, 1.0f);
  const float top_p = row_parameter(p.top_p, b, 1.0f), min_p = row_parameter(p.min_p, b, 0.0f);
  const int top_k = row_parameter(p.top_k, b, 0);
  // Written so that NaN fails too.
  if (!(temperature >= 0.0f && temperature < 1e30f && penalty > 0.0f && penalty < 1e30f &&
        top_p > 0.0f && top_p <= 1.0f && min_p >= 0.0f && min_p <= 1.0f && top_k >= 0)) {
    return answer(-1);
  }
  const bool greedy = temperature == 0.0f, penalised = penalty != 1.0f && p.history != nullptr;
  const float divisor = greedy ? 1.0f : temperature;

  uint64_t place = 0;
  each_four<kAligned ? kSampleBatch : 1, kAligned, false>(
      logits, V, [&](int at, const float (&v)[4]) {
        float scaled[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scaled[i] = v[i] / divisor;
          place = v[i] <= 3.402823466e38f ? better(place, scaled[i], at + i) : kBadRow;
        }
        Vec<float> out;
        pack(scaled, out);
        if (at < V && (!greedy || penalised)) store16(x + at, out);
      });
  place = largest_place(place, scratch);
  if (place != kBadRow && penalised) {
    place = 0;
    const int32_t begin = load_raw<int32_t>(p.cu_history + b);
    const int32_t end = load_raw<int32_t>(p.cu_history + b + 1);
    if (begin < 0 || end > p.L) place = kBadRow;
    for (int64_t i = begin + static_cast<int>(threadIdx.x); i < end && place != kBadRow;
         i += kSampleThreads) {
      const int64_t token = load_raw<int64_t>(p.history + i);
      if (token < 0 || token >= p.V) {
        place = kBadRow;
        continue;
      }
      // From the original: a repeated token is penalised once.
      const float v = load_raw<float>(logits + token);
      store_raw<float>(x + token, (v > 0.0f ? v / penalty : v * penalty) / divisor);
    }
    __syncthreads();
    each_four<kSampleBatch>(x, V, [&](int at, const float (&v)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) place = better(place, v[i], at + i);
    });
    place = largest_place(place, scratch);
  }
  const float best = value_at(place);
  if (place == kBadRow || !(best > negative_infinity())) return answer(-1);
  if (greedy) return answer(index_at(place));
  if (best == -negative_infinity()) return answer(-1);

  const float kept =
      top_k > 0 && top_k < V ? top_k_value(x, V, top_k, scratch) : negative_infinity();
  // In double, for a correctly rounded logarithm.
  const float floor = min_p > 0.0f ? best + static_cast<float>(log(static_cast<double>(min_p)))
                                   : negative_infinity();
  const Draw draw{.x = x,
                  .V = V,
                  .best = best,
                  .at_least = fmaxf(kept, floor),
                  .seed = static_cast<uint64_t>(row_parameter<int64_t>(p.seed, b, 0)),
                  .index = static_cast<uint64_t>(row_parameter<int64_t>(p.index, b, 0))};
  for (float cut = negative_infinity();;) {
    const int token = draw_token(draw, cut, scratch);
    const float value = load_raw<float>(x + token);
    if (top_p == 1.0f || within_top_p(x, V, best, kept, value, top_p, scratch)) {
      return answer(token);
    }
    cut = value;
  }
}

}  // namespace ivr::cuda
