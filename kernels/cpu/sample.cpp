// sample on the CPU: one thread per row. Greedy rows read the logits once. Otherwise the row is
// copied to the workspace and filtered by thresholds that a radix selection finds without sorting.
#include "kernels/sample.h"

#include <math.h>

#include "kernels/cpu/simd.h"

namespace ivr {
namespace {

// Gumbel noise of a 24-bit uniform lies in [-2.86, 16.64]: a token this far below the largest logit
// cannot win, so no noise is drawn for it.
constexpr float kGumbelReach = 20.0f;

// The caller has refused NaN.
float row_max(const float* x, int64_t n) {
  F m = set(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) m = max(load(x + i), m);
  float best = largest(m);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// NaN or +inf anywhere: x - x is NaN for both, and for -inf, which is a legal "never".
bool has_bad_value(const float* x, int64_t n) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= !(x[i] <= 3.402823466e38f);
  return bad;
}

int64_t first_at_least(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] >= value) return i;
  }
  return -1;
}

// Orders like the floats: larger float, larger key.
inline uint32_t key_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The smallest value v such that the weight of the values above v is less than `limit`; -inf where
// all of them weigh less. weight(i) is 1 for top-k, the probability for top-p. -inf weighs nothing.
template <class Weight>
float threshold(const float* x, int64_t n, double limit, const Weight& weight) {
  uint32_t prefix = 0, mask = 0;
  double above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    double bucket[256] = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if ((key & mask) == prefix && x[i] > -INFINITY) bucket[key >> shift & 255] += weight(i);
    }
    int b = 255;
    while (b >= 0 && above + bucket[b] < limit) above += bucket[b--];
    if (b < 0) return -INFINITY;
    prefix |= static_cast<uint32_t>(b) << shift;
    mask |= 255u << shift;
  }
  const uint32_t u = prefix & 0x80000000u ? prefix & 0x7fffffffu : ~prefix;
  float v;
  memcpy(&v, &u, 4);
  return v;
}

void drop_below(float* x, int64_t n, float limit) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < limit ? -INFINITY : x[i];
}

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
void philox(const uint32_t counter[4], uint64_t seed, uint32_t out[4]) {
  uint32_t a = counter[0], b = counter[1], c = counter[2], d = counter[3];
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = static_cast<uint64_t>(a) * 0xD2511F53u;
    const uint64_t q = static_cast<uint64_t>(c) * 0xCD9E8D57u;
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

double gumbel(int64_t token, uint64_t seed, uint64_t index) {
  const uint32_t counter[4] = {static_cast<uint32_t>(token / 4), static_cast<uint32_t>(index),
                               static_cast<uint32_t>(index >> 32), 0};
  uint32_t random[4];
  philox(counter, seed, random);
  const double u = ((random[token % 4] >> 8) + 0.5) * 0x1p-24;
  return -log(-log(u));
}

int64_t sample_row(const SampleParams& p, int64_t b) {
  const float* logits = p.logits + b * p.logits_b;
  const int64_t V = p.V;
  if (has_bad_value(logits, V)) return -1;

  const float temperature = p.temperature ? p.temperature[b] : 0.0f;
  const float penalty = p.repetition_penalty ? p.repetition_penalty[b] : 1.0f;
  float* x = p.workspace + b * p.workspace_b;
  const float* source = logits;
  if (penalty != 1.0f && p.history) {
    memcpy(x, logits, static_cast<size_t>(V) * 4);
    // Always from the original value: a repeated token is penalised once.
    for (int32_t i = p.cu_history[b]; i < p.cu_history[b + 1]; ++i) {
      const float v = logits[p.history[i]];
      x[p.history[i]] = v > 0 ? v / penalty : v * penalty;
    }
    source = x;
  }
  if (temperature == 0.0f) {
    const float best = row_max(source, V);
    return best > -INFINITY ? first_at_least(source, V, best) : -1;
  }

  for (int64_t i = 0; i < V; ++i) x[i] = source[i] / temperature;
  const float best = row_max(x, V);
  if (!(best > -INFINITY) || best == INFINITY) return -1;
  const int32_t top_k = p.top_k ? p.top_k[b] : 0;
  if (top_k > 0 && top_k < V) {
    drop_below(x, V, threshold(x, V, top_k, [](int64_t) { return 1.0; }));
  }
  const float top_p = p.top_p ? p.top_p[b] : 1.0f;
  if (top_p < 1.0f) {
    const auto weight = [&](int64_t i) { return ::exp(static_cast<double>(x[i]) - best); };
    double total = 0;
    for (int64_t i = 0; i < V; ++i) total += weight(i);
    drop_below(x, V, threshold(x, V, top_p * total, weight));
  }
  const float min_p = p.min_p ? p.min_p[b] : 0.0f;
  if (min_p > 0.0f) drop_below(x, V, best + logf(min_p));

  const uint64_t seed = p.seed ? static_cast<uint64_t>(p.seed[b]) : 0;
  const uint64_t index = p.index ? static_cast<uint64_t>(p.index[b]) : 0;
  int64_t winner = -1;
  double high = -INFINITY;
  for (int64_t i = 0; i < V; ++i) {
    if (x[i] < best - kGumbelReach) continue;
    const double score = x[i] + gumbel(i, seed, index);
    if (score > high) {
      high = score;
      winner = i;
    }
  }
  return winner;
}

}  // namespace

namespace IVR_ISA {

void sample(const SampleParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) p.out[b] = sample_row(p, b);
}

}  // namespace IVR_ISA
}  // namespace ivr
