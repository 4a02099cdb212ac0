// moe_route on the GPU (contract: kernels/moe_route.h).
//
// Mapping    a warp takes a token and looks for its experts one after the other. The assignments
//            are sorted by counting: for an expert, those of lower ones say where its places begin,
//            and ballots which of them an assignment gets; nothing is added atomically, so places
//            are those of a stable sort.
// Grid       up to kRouteWarps tokens one block does everything; above, tokens are one launch and
//            experts another, a block each.
// Bits       of a token's weights depend on its logits alone: sums are over its experts in their
//            order, or over all E by lanes.
// Bytes      T * E * size, 16 per assignment; an expert's block reads all 4 * T * k of ids, from
// L2.
#pragma once

#include <cstdio>

#include "kernels/cuda/places.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/moe_route.h"

namespace ivr::cuda {

constexpr int kRouteWarps = 32;      // of a block that sorts
constexpr int kRouteTokenWarps = 4;  // of a block that routes tokens alone

struct MoeRouteConfig {
  bool whole;  // one block routes all tokens and sorts
  unsigned token_blocks, expert_blocks;
};

inline bool moe_route_supported(const MoeRouteParams& p) {
  return is_float(p.dtype) && p.T * p.k <= kMaxIndex && p.E < kMaxRow;
}

inline MoeRouteConfig moe_route_config(const MoeRouteParams& p) {
  if (p.T <= kRouteWarps) return {true, 1, 0};
  return {false, static_cast<unsigned>((p.T + kRouteTokenWarps - 1) / kRouteTokenWarps),
          static_cast<unsigned>(p.E)};
}

// `whole=0 grid=80+128`; returns what snprintf returns.
inline int format(const MoeRouteConfig& c, char* out, size_t size) {
  return std::snprintf(out, size, "whole=%d grid=%u+%u", static_cast<int>(c.whole), c.token_blocks,
                       c.expert_blocks);
}

// ---- a token's experts --------------------------------------------------------------------------

IVR_DEVICE float load_logit(const MoeRouteParams& p, int64_t t, int e) {
  return load_float(p.logits, t * p.logits_t + e, p.dtype == DType::f32);
}

// NaN is above all, and one NaN like the other.
IVR_DEVICE uint64_t place_of_logit(float x, int e) {
  return place_of(x != x ? __uint_as_float(0x7fc00000u) : x, e);
}

// By a whole warp.
IVR_DEVICE void route_token(const MoeRouteParams& p, int64_t t) {
  const int lane = threadIdx.x % kWarpSize;
  const int E = static_cast<int>(p.E), k = static_cast<int>(p.k);
  float* weights = p.weights + t * p.weights_t;
  uint64_t last = ~uint64_t{0};
  float best = 0.0f, total = 0.0f;
  for (int j = 0; j < k; ++j) {
    uint64_t place = 0;
    for (int e = lane; e < E; e += kWarpSize) {
      const uint64_t other = place_of_logit(load_logit(p, t, e), e);
      if (other < last && other > place) place = other;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const uint64_t other = __shfl_xor_sync(kFullMask, place, offset);
      if (other > place) place = other;
    }
    last = place;
    if (j == 0) best = value_at(place);
    const float weight = expf(value_at(place) - best);
    total += weight;
    if (lane != j % kWarpSize) continue;
    store_raw<int32_t>(p.ids + t * p.ids_t + j, index_at(place));
    store_raw<float>(weights + j, weight);
  }
  if (!p.normalize) {
    total = 0.0f;
    for (int e = lane; e < E; e += kWarpSize) total += expf(load_logit(p, t, e) - best);
    total = warp_sum(total, kWarpSize);
  }
  // A lane reads back only what it wrote itself.
  for (int j = lane; j < k; j += kWarpSize) {
    store_raw<float>(weights + j, load_raw<float>(weights + j) / total);
  }
}

// ---- an expert's tokens -------------------------------------------------------------------------

struct Assignment {
  int64_t t;
  int j, expert;
};

// The i-th; none at or behind `end`: its expert is above all.
IVR_DEVICE Assignment assignment(const MoeRouteParams& p, int i, int end) {
  const int k = static_cast<int>(p.k), t = i / k, j = i % k;
  return {t, j, i < end ? load_raw<int32_t>(p.ids + t * p.ids_t + j) : static_cast<int>(p.E)};
}

struct Tally {
  int lower, own;  // assignments to lower experts and to the one in question
};

// Of assignments [begin, end), by a whole warp.
IVR_DEVICE Tally count_assignments(const MoeRouteParams& p, int expert, int begin, int end) {
  Tally tally{0, 0};
  for (int i = begin; i < end; i += kWarpSize) {
    const int other = assignment(p, i + static_cast<int>(threadIdx.x) % kWarpSize, end).expert;
    tally.lower += count_bits(__ballot_sync(kFullMask, other < expert));
    tally.own += count_bits(__ballot_sync(kFullMask, other == expert));
  }
  return tally;
}

// Gives the expert's assignments among [begin, end) the places from `place` on, by a whole warp.
IVR_DEVICE void place_assignments(const MoeRouteParams& p, int expert, int begin, int end,
                                  int place) {
  const int lane = threadIdx.x % kWarpSize;
  for (int i = begin; i < end; i += kWarpSize) {
    const Assignment a = assignment(p, i + lane, end);
    const uint32_t own = __ballot_sync(kFullMask, a.expert == expert);
    if (a.expert == expert) {
      const int mine = place + count_bits(own & ((1u << lane) - 1));
      store_raw<int32_t>(p.tokens + mine, static_cast<int32_t>(a.t));
      store_raw<int32_t>(p.places + a.t * p.places_t + a.j, mine);
    }
    place += count_bits(own);
  }
}

// By one thread of those that know.
IVR_DEVICE void store_offset(const MoeRouteParams& p, int expert, int offset) {
  store_raw<int32_t>(p.offsets + expert, offset);
  if (expert + 1 == p.E) {
    store_raw<int32_t>(p.offsets + p.E, static_cast<int32_t>(p.T * p.k));
  }
}

// ---- what blocks do; the kernels' whole bodies, also under emulation ----------------------------

IVR_DEVICE void moe_route_tokens_block(const MoeRouteParams& p) {
  const int64_t t = int64_t{blockIdx.x} * kRouteTokenWarps + threadIdx.x / kWarpSize;
  if (t < p.T) route_token(p, t);
}

// The block's warps share the assignments, a stretch each.
IVR_DEVICE void moe_route_experts_block(const MoeRouteParams& p) {
  IVR_SHARED(int, lower, kRouteWarps);
  IVR_SHARED(int, own, kRouteWarps);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int expert = static_cast<int>(blockIdx.x);
  const int64_t all = p.T * p.k;
  const int begin = static_cast<int>(all * warp / kRouteWarps);
  const int end = static_cast<int>(all * (warp + 1) / kRouteWarps);
  const Tally tally = count_assignments(p, expert, begin, end);
  if (lane == 0) {
    lower[warp] = tally.lower;
    own[warp] = tally.own;
  }
  __syncthreads();
  int offset = 0, before = 0;
  for (int w = 0; w < kRouteWarps; ++w) {
    offset += lower[w];
    if (w < warp) before += own[w];
  }
  if (threadIdx.x == 0) store_offset(p, expert, offset);
  place_assignments(p, expert, begin, end, offset + before);
}

IVR_DEVICE void moe_route_whole_block(const MoeRouteParams& p) {
  const int warp = threadIdx.x / kWarpSize, all = static_cast<int>(p.T * p.k);
  if (warp < p.T) route_token(p, warp);
  __syncthreads();
  for (int expert = warp; expert < p.E; expert += kRouteWarps) {
    const int offset = count_assignments(p, expert, 0, all).lower;
    if (threadIdx.x % kWarpSize == 0) store_offset(p, expert, offset);
    place_assignments(p, expert, 0, all, offset);
  }
}

}  // namespace ivr::cuda
