// paged_attention on the GPU (contract: kernels/paged_attention.h; method: attention_core.cuh).
//
// Prefill    as flash_attention, but for where a key lies.
// Decode     (a workspace is given; tensor cores) keys are split at fixed positions: a block takes
//            16 rows of a kv head, which is all query heads of a group up to 16, and one split; its
//            four warps a quarter of the split each. A second kernel adds up the splits of a row in
//            ascending order. Where the table has room for one split only, the first kernel does
//            what the second would.
//            Splits depend on positions alone, so a row's bits do not depend on the batch or on how
//            much room the table has.
// Pages      an entry of the table that is no page, or lies behind the table, is not followed: the
//            rows that would have read it become NaN, and so does nobody else's row.
// Bytes      keys * K * D * 4 per sequence, and splits * T * H * (D + 2) * 8 for the partial
// results.
#pragma once

#include <cstdio>

#include "kernels/cuda/attention_core.cuh"
#include "kernels/paged_attention.h"

namespace ivr::cuda {

// ---- configuration ------------------------------------------------------------------------------

// Keys and values of a split fill 64 KB of shared memory: all of it is asked for at once, and three
// such blocks of an SM hide each other's latency.
template <int kD>
constexpr int kSplitKeys = 16384 / kD;
template <int kD>
constexpr size_t kSplitSharedBytes = sizeof(bf16) * 2 * kSplitKeys<kD> * kD;
constexpr int kSplitRows = 16;

struct PagedAttentionConfig {
  int head_dim;  // of the tensor core kernels; 0: the plain one
  int rows;      // of a block
  size_t shared_bytes;
  unsigned blocks;  // times kv heads
  unsigned splits;  // 0: a block walks all keys
};

inline bool paged_attention_supported(const PagedAttentionParams& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  constexpr int64_t kMaxSplits = 65535;
  return attention_supported(p.a) && p.pages <= kMax && p.max_pages <= (kMax >> p.page_shift) &&
         (p.workspace == nullptr || (p.max_pages << p.page_shift) / kSplitKeys<128> < kMaxSplits);
}

inline unsigned paged_attention_splits(int64_t D, int64_t keys) {
  const int64_t split = D == 64 ? kSplitKeys<64> : kSplitKeys<128>;
  return static_cast<unsigned>(keys <= split ? 1 : (keys + split - 1) / split);
}

// Floats of workspace that a decode step of T queries and at most `keys` keys needs: outputs
// [splits, T * H, D], then statistics [splits, T * H, 2]. 0: decode steps have no kernel of their
// own.
inline int64_t paged_attention_workspace(const AttentionParams& a, int64_t keys) {
  if (!attention_on_tensor_cores(a)) return 0;
  return paged_attention_splits(a.D, keys) * a.T * a.K * a.group * (a.D + 2);
}

inline PagedAttentionConfig paged_attention_config(const PagedAttentionParams& p) {
  PagedAttentionConfig c{0, kPlainBlockRows, 0, 0, 0};
  if (attention_on_tensor_cores(p.a)) {
    const bool narrow = p.a.D == 64;
    c.head_dim = static_cast<int>(p.a.D);
    if (p.workspace != nullptr) {
      c.rows = kSplitRows;
      c.splits = paged_attention_splits(p.a.D, p.max_pages << p.page_shift);
      c.shared_bytes = narrow ? kSplitSharedBytes<64> : kSplitSharedBytes<128>;
    } else {
      c.rows = narrow ? kAttentionBlockRows<64> : kAttentionBlockRows<128>;
      c.shared_bytes = narrow ? kAttentionSharedBytes<64> : kAttentionSharedBytes<128>;
    }
  }
  c.blocks = attention_row_blocks(p.a, c.rows);
  return c;
}

inline int format(const PagedAttentionConfig& c, char* out, size_t size) {
  return std::snprintf(out, size, "head_dim=%d rows=%d shared=%zu blocks=%u splits=%u", c.head_dim,
                       c.rows, c.shared_bytes, c.blocks, c.splits);
}

// Returns f.template operator()<T, kD>(), kD = 0 for the plain kernel; head_dim says which.
template <typename F>
auto with_paged_attention_kernel(DType dtype, const PagedAttentionConfig& c, F&& f) {
  if (c.head_dim == 64) return f.template operator()<bf16, 64>();
  if (c.head_dim == 128) return f.template operator()<bf16, 128>();
  return dtype == DType::f32 ? f.template operator()<float, 0>() : f.template operator()<bf16, 0>();
}

// ---- device -------------------------------------------------------------------------------------

// Keys and values of one sequence and kv head, in pages.
template <typename T>
struct PagedKeys {
  const T* k;
  const T* v;
  const int32_t* table;
  int64_t k_page, k_p, v_page, v_p;
  int pages, max_pages, shift;

  IVR_DEVICE bool locate(int key, const T*& k_row, const T*& v_row) const {
    const int i = key >> shift, offset = key & ((1 << shift) - 1);
    if (i >= max_pages) return false;
    const int page = load_raw<int32_t>(table + i);
    if (page < 0 || page >= pages) return false;
    k_row = k + page * k_page + offset * k_p;
    v_row = v + page * v_page + offset * v_p;
    return true;
  }
};

template <typename T>
IVR_DEVICE PagedKeys<T> paged_keys(const PagedAttentionParams& p, int sequence, int kv_head) {
  return {static_cast<const T*>(p.k_cache) + kv_head * p.k_h,
          static_cast<const T*>(p.v_cache) + kv_head * p.v_h,
          p.page_table + sequence * p.page_table_b,
          p.k_page,
          p.k_p,
          p.v_page,
          p.v_p,
          static_cast<int>(p.pages),
          static_cast<int>(p.max_pages),
          p.page_shift};
}

// The block's rows, or none.
template <int kRows>
IVR_DEVICE AttentionRows paged_rows(const PagedAttentionParams& p, unsigned index) {
  AttentionRows rows = find_rows<kRows>(p.a, static_cast<int>(index));
  if (rows.sequence < 0) return rows;
  describe_rows(p.a, load_raw<int32_t>(p.kv_lens + rows.sequence), rows);
  return rows;
}

// Prefill, and decode on the plain path.
template <typename T, int kD>
IVR_DEVICE void paged_attention_block(const PagedAttentionParams& p) {
  constexpr int kRows = kD == 0 ? kPlainBlockRows : kAttentionBlockRows<kD>;
  // The blocks at the end of a sequence see the most keys and come first.
  const AttentionRows rows = paged_rows<kRows>(p, gridDim.x - 1 - blockIdx.x);
  if (rows.sequence < 0) return;
  const int kv_head = static_cast<int>(blockIdx.y);
  const PagedKeys<T> source = paged_keys<T>(p, rows.sequence, kv_head);
  if constexpr (kD == 0) {
    plain_attention_rows<T>(p.a, rows, kv_head, source);
  } else {
    IVR_DYNAMIC_SHARED(bf16, tiles);
    attention_block<kD>(p.a, rows, kv_head, source, tiles);
  }
}

// ---- decode: splits -----------------------------------------------------------------------------

// Partial results of a row and split: the output sum [D], and {top, sum}.
struct Partials {
  float* out;
  float* statistics;

  IVR_DEVICE Partials(const PagedAttentionParams& p, int splits, int split, int64_t row) {
    const int64_t count = p.a.T * p.a.K * p.a.group;
    out = p.workspace + (split * count + row) * p.a.D;
    statistics = p.workspace + splits * count * p.a.D + (split * count + row) * 2;
  }
};

// Row of the workspace: (query, head).
IVR_DEVICE int64_t partial_row(const PagedAttentionParams& p, const AttentionRows& rows,
                               int kv_head, int row) {
  return query_offset(rows, kv_head, row, p.a.K * p.a.group, 1);
}

IVR_DEVICE float load_statistic(const float* p) { return __uint_as_float(load_raw<uint32_t>(p)); }
IVR_DEVICE void store_statistic(float* p, float v) { store_raw(p, __float_as_uint(v)); }

// Writes four columns of a finished row.
IVR_DEVICE void store_output(const PagedAttentionParams& p, const AttentionRows& rows, int kv_head,
                             int row, int column, float top, float sum, float (&out)[4]) {
  const float factor = finish_factor(p.a, kv_head * rows.group + row % rows.group, top, sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] *= factor;
  store_quad(
      static_cast<bf16*>(p.a.out) + query_offset(rows, kv_head, row, p.a.out_t, p.a.out_h) + column,
      out);
}

// Block (row block, kv head, split).
template <int kD>
IVR_DEVICE void split_attention_block(const PagedAttentionParams& p) {
  constexpr int kWarpKeys = kSplitKeys<kD> / kAttentionWarps;
  constexpr int kTile = kWarpKeys * kD;
  constexpr int kRowFloats = kD + 4;  // 16 bytes of padding: neighbouring rows on different banks
  IVR_DYNAMIC_SHARED(bf16, tiles);
  IVR_SHARED(float, statistics, kAttentionWarps * kSplitRows * 2);
  const AttentionRows rows = paged_rows<kSplitRows>(p, blockIdx.x);
  if (rows.sequence < 0) return;
  const AttentionKeys keys = visible_keys<kSplitRows>(rows);
  const int split = static_cast<int>(blockIdx.z), splits = static_cast<int>(gridDim.z);
  const int split_begin = split * kSplitKeys<kD>;
  const bool unseen = split_begin + kSplitKeys<kD> <= keys.begin || split_begin >= keys.end;
  // The second kernel does not ask for it; a single split has no second kernel.
  if (unseen && splits > 1) return;

  const int kv_head = static_cast<int>(blockIdx.y);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = split_begin + warp * kWarpKeys;
  const Shared<bf16> k_tile = tiles + 2 * warp * kTile;
  const PagedKeys<bf16> source = paged_keys<bf16>(p, rows.sequence, kv_head);
  const bool any = first < keys.end && first + kWarpKeys > keys.begin;
  if (any) {
    load_tile<kD, kWarpKeys, kWarpSize>(source, first, keys.begin, keys.end, k_tile, k_tile + kTile,
                                        lane);
    commit_copies();
  }
  AttentionState<kD, 1> s;
  begin_rows(p.a, rows, kv_head, rows.first_row, s);
  if (any) {
    wait_copies<0>();
    __syncwarp();
    attend_tile<kD, 1, kWarpKeys>(s, k_tile, k_tile + kTile, first, keys.end, true, rows.window,
                                  rows.prefix, p.a.scale * kLog2E);
  }

  // The warp's results take the place of its own tiles.
  __syncwarp();
  const Shared<float> results = shared_cast<float>(k_tile);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane_row(0, 0, h);
    const float sum = quad_sum(s.sum[0][h]);
    if (lane % 4 == 0) {
      statistics[(warp * kSplitRows + row) * 2] = s.top[0][h];
      statistics[(warp * kSplitRows + row) * 2 + 1] = sum;
    }
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        results[row * kRowFloats + n * 8 + lane % 4 * 2 + e] = s.out[0][n][2 * h + e];
      }
    }
  }
  __syncthreads();

  constexpr int kQuads = kD / 4;
  for (int i = threadIdx.x; i < kSplitRows * kQuads; i += kAttentionThreads) {
    const int in_block = i / kQuads, column = i % kQuads * 4, row = rows.first_row + in_block;
    if (row >= rows.row_count()) break;
    float top = kMinusInfinity, sum = 0.0f, out[4] = {};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      top = fmaxf(top, statistics[(w * kSplitRows + in_block) * 2]);
    }
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float other = statistics[(w * kSplitRows + in_block) * 2];
      const float factor = other == kMinusInfinity ? 0.0f : exp2_fast(other - top);
      sum += factor * statistics[(w * kSplitRows + in_block) * 2 + 1];
      float part[4];
      unpack(
          load16_shared(shared_cast<float>(tiles + 2 * w * kTile) + in_block * kRowFloats + column),
          part);
#pragma unroll
      for (int e = 0; e < 4; ++e) out[e] += factor * part[e];
    }
    if (splits == 1) {
      if (keys.end > kSplitKeys<kD>) sum = kNaN;
      store_output(p, rows, kv_head, row, column, top, sum, out);
      continue;
    }
    const Partials to(p, splits, split, partial_row(p, rows, kv_head, row));
    store_quad(to.out + column, out);
    if (column == 0) {
      store_statistic(to.statistics, top);
      store_statistic(to.statistics + 1, sum);
    }
  }
}

// Adds up the splits of 16 rows. Block (row block, kv head).
template <int kD>
IVR_DEVICE void merge_attention_block(const PagedAttentionParams& p, int splits) {
  constexpr int kQuads = kD / 4;
  const AttentionRows rows = paged_rows<kSplitRows>(p, blockIdx.x);
  if (rows.sequence < 0) return;
  const AttentionKeys keys = visible_keys<kSplitRows>(rows);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int begin = keys.begin / kSplitKeys<kD>;
  const int last = (keys.end + kSplitKeys<kD> - 1) / kSplitKeys<kD>;
  for (int i = threadIdx.x; i < kSplitRows * kQuads; i += kAttentionThreads) {
    const int row = rows.first_row + i / kQuads, column = i % kQuads * 4;
    if (row >= rows.row_count()) break;
    const int64_t at = partial_row(p, rows, kv_head, row);
    float top = kMinusInfinity, sum = 0.0f, out[4] = {};
    for (int split = begin; split < min(last, splits); ++split) {
      top = fmaxf(top, load_statistic(Partials(p, splits, split, at).statistics));
    }
    for (int split = begin; split < min(last, splits); ++split) {
      const Partials from(p, splits, split, at);
      const float other = load_statistic(from.statistics);
      const float factor = other == kMinusInfinity ? 0.0f : exp2_fast(other - top);
      sum += factor * load_statistic(from.statistics + 1);
      float part[4];
      load_quad(from.out + column, part);
#pragma unroll
      for (int e = 0; e < 4; ++e) out[e] += factor * part[e];
    }
    // A sequence longer than the table.
    if (last > splits) sum = kNaN;
    store_output(p, rows, kv_head, row, column, top, sum, out);
  }
}

}  // namespace ivr::cuda
