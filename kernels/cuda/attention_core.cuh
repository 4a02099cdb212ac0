// What flash_attention and paged_attention share on the GPU: everything but where K and V lie.
//
// Rows       row = query * group + head within the group, per sequence and kv head: the heads of a
//            group stand together and share the keys and values that are loaded.
// Keys       are walked in tiles at multiples of the tile's size, in ascending order. A tile that a
//            row does not see changes none of its bits, so a row's result depends on its query and
//            the keys that it sees, not on the rows beside it.
// Softmax    online (Milakov and Gimelshein, 2018; Dao et al., 2022), in powers of two, statistics
//            and sums in fp32; weights are rounded to bf16 before they meet V in the tensor cores.
// Two paths  tensor cores (bf16, head dims 64 and 128), and plain multiply-adds for the rest: every
//            head dim that is a multiple of 4 up to 256, bf16 and f32.
#pragma once

#include <limits>

#include "kernels/attention.h"
#include "kernels/cuda/tiles.cuh"

namespace ivr::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// False where a count overflows 32 bits or a row cannot be fetched in vectors.
inline bool attention_supported(const AttentionParams& a) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (a.dtype != DType::f32 && a.dtype != DType::bf16) return false;
  return a.D % 4 == 0 && a.D <= kAttentionMaxHeadDim && a.K <= 65535 && a.T * a.group <= kMax / 2 &&
         a.B <= kMax / 2;
}

// Upper bound of the row blocks of all sequences, whatever their lengths: a launch depends on sizes
// alone, so that it can be captured.
inline unsigned attention_row_blocks(const AttentionParams& a, int rows) {
  return static_cast<unsigned>(a.T * a.group / rows + a.B);
}

// ---- which rows, which keys ---------------------------------------------------------------------

// One sequence and a block of its rows.
struct AttentionRows {
  int sequence;  // -1: none
  int first_row;
  int first_query;  // of the sequence, in q
  int queries;
  int keys;
  int prefix;
  int window;  // at most keys + 1
  int group;
  bool causal;

  IVR_DEVICE int row_count() const { return queries * group; }
  // The last key that a query sees, but for the prefix; the one before the first is
  // last - window.
  IVR_DEVICE int last_key(int query) const { return causal ? query + keys - queries : keys - 1; }
};

// Keys that some row of a block sees lie in [begin, end); tiles within [whole_begin, whole_end) or
// the prefix are seen by all of them.
struct AttentionKeys {
  int begin, end, whole_begin, whole_end;
};

// The index-th block of kRows rows; the blocks of all sequences are counted one after the other.
// The whole warp calls it. Only sequence and first_row are filled in.
template <int kRows>
IVR_DEVICE AttentionRows find_rows(const AttentionParams& a, int index) {
  const int lane = threadIdx.x % kWarpSize;
  for (int first = 0; first < a.B; first += kWarpSize) {
    const int b = first + lane;
    int blocks = 0;
    if (b < a.B) {
      const int queries = load_raw<int32_t>(a.cu_q + b + 1) - load_raw<int32_t>(a.cu_q + b);
      blocks = (queries * static_cast<int>(a.group) + kRows - 1) / kRows;
    }
    int end = blocks;
#pragma unroll
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
      const int below = __shfl_up_sync(kFullMask, end, delta);
      if (lane >= delta) end += below;
    }
    const unsigned behind = __ballot_sync(kFullMask, index < end);
    if (behind != 0) {
      const int source = __ffs(static_cast<int>(behind)) - 1;
      const int begin = __shfl_sync(kFullMask, end - blocks, source);
      AttentionRows rows{};
      rows.sequence = first + source;
      rows.first_row = (index - begin) * kRows;
      return rows;
    }
    index -= __shfl_sync(kFullMask, end, kWarpSize - 1);
  }
  AttentionRows none{};
  none.sequence = -1;
  return none;
}

// Fills in the rest for a sequence of `keys` keys.
IVR_DEVICE void describe_rows(const AttentionParams& a, int keys, AttentionRows& rows) {
  const int b = rows.sequence;
  rows.first_query = load_raw<int32_t>(a.cu_q + b);
  rows.queries = load_raw<int32_t>(a.cu_q + b + 1) - rows.first_query;
  rows.keys = keys;
  rows.prefix = a.prefix == nullptr ? 0 : load_raw<int32_t>(a.prefix + b);
  rows.window = a.window > keys ? keys + 1 : static_cast<int>(a.window);
  rows.group = static_cast<int>(a.group);
  rows.causal = a.causal;
}

IVR_DEVICE int at_least_0(int n) { return n > 0 ? n : 0; }

template <int kRows>
IVR_DEVICE AttentionKeys visible_keys(const AttentionRows& rows) {
  const int first = rows.last_key(rows.first_row / rows.group);
  const int last_row = min(rows.first_row + kRows, rows.row_count()) - 1;
  const int last = rows.last_key(last_row / rows.group);
  AttentionKeys k;
  k.begin = rows.prefix > 0 ? 0 : at_least_0(first - rows.window + 1);
  k.end = max(at_least_0(last + 1), rows.prefix);
  k.whole_begin = at_least_0(last - rows.window + 1);
  k.whole_end = first + 1;
  return k;
}

// ---- where keys and values lie ------------------------------------------------------------------

// Rows of one sequence and kv head, one behind the other.
template <typename T>
struct DenseKeys {
  const T* k;
  const T* v;
  int64_t k_t, v_t;

  IVR_DEVICE bool locate(int key, const T*& k_row, const T*& v_row) const {
    k_row = k + key * k_t;
    v_row = v + key * v_t;
    return true;
  }
};

// ---- tensor cores -------------------------------------------------------------------------------

// Asks for keys [first, first + kKeys) of which [begin, end) exist, by kThreads threads. Rows that
// do not exist become zero. A key that cannot be located gets NaN for its value: whoever looks at
// it is told.
template <int kD, int kKeys, int kThreads, class Source>
IVR_DEVICE void load_tile(const Source& source, int first, int begin, int end, Shared<bf16> k_tile,
                          Shared<bf16> v_tile, int thread) {
  constexpr int kChunks = kD / 8;
#pragma unroll
  for (int i = 0; i < kKeys * kChunks / kThreads; ++i) {
    const int row = (thread + i * kThreads) / kChunks, chunk = (thread + i * kThreads) % kChunks;
    const int key = first + row, at = tile_offset<kD>(row, chunk);
    const bool wanted = key >= begin && key < end;
    const bf16 *k_row = source.k, *v_row = source.v;
    const bool found = wanted && source.locate(key, k_row, v_row);
    copy16_async(k_tile + at, k_row + chunk * 8, found);
    if (wanted && !found) {
      constexpr uint32_t kPair = 0x7fff7fffu;  // NaN, twice
      store16_shared(v_tile + at, Vec<bf16>{{kPair, kPair, kPair, kPair}});
    } else {
      copy16_async(v_tile + at, v_row + chunk * 8, found);
    }
  }
}

// What a warp knows of its kRowTiles * 16 rows: fragments of q and of the output (prim.cuh), and
// per row (this lane's g and g + 8 of each tile) the statistics. `sum` is this lane's part.
template <int kD, int kRowTiles>
struct AttentionState {
  uint32_t q[kRowTiles][kD / 16][4];
  float out[kRowTiles][kD / 8][4];
  float top[kRowTiles][2];  // largest score so far, times scale * log2(e)
  float sum[kRowTiles][2];
  int last[kRowTiles][2];  // last visible key
};

// This lane's row of tile r, half h; the warp's rows start at first_row.
IVR_DEVICE int lane_row(int first_row, int r, int h) {
  return first_row + r * 16 + h * 8 + static_cast<int>(threadIdx.x % kWarpSize) / 4;
}

IVR_DEVICE int64_t query_offset(const AttentionRows& rows, int kv_head, int row, int64_t stride_t,
                                int64_t stride_h) {
  const int query = row / rows.group, head = row % rows.group;
  return (rows.first_query + query) * stride_t + (kv_head * rows.group + head) * stride_h;
}

// All but q. Rows behind the last repeat it and are never written.
template <int kD, int kRowTiles>
IVR_DEVICE void begin_sums(const AttentionRows& rows, int first_row,
                           AttentionState<kD, kRowTiles>& s) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(lane_row(first_row, r, h), rows.row_count() - 1);
      s.last[r][h] = rows.last_key(row / rows.group);
      s.top[r][h] = kMinusInfinity;
      s.sum[r][h] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s.out[r][n][e] = 0.0f;
    }
  }
}

template <int kD, int kRowTiles>
IVR_DEVICE void begin_rows(const AttentionParams& a, const AttentionRows& rows, int kv_head,
                           int first_row, AttentionState<kD, kRowTiles>& s) {
  const int column = threadIdx.x % 4 * 2;
  begin_sums(rows, first_row, s);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(lane_row(first_row, r, h), rows.row_count() - 1);
      const bf16* q =
          static_cast<const bf16*>(a.q) + query_offset(rows, kv_head, row, a.q_t, a.q_h) + column;
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        s.q[r][k][h] = load_raw<uint32_t>(q + k * 16);
        s.q[r][k][h + 2] = load_raw<uint32_t>(q + k * 16 + 8);
      }
    }
  }
}

IVR_DEVICE float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullMask, v, 1));
  return fmaxf(v, __shfl_xor_sync(kFullMask, v, 2));
}

IVR_DEVICE float quad_sum(float v) {
  v += __shfl_xor_sync(kFullMask, v, 1);
  return v + __shfl_xor_sync(kFullMask, v, 2);
}

// Scores of this lane's two rows: score[n] is its fragment of keys [8 n, 8 n + 8) behind `first`.
// Those of keys that a row does not see become -inf.
template <int kTiles>
IVR_DEVICE void mask_scores(float (&score)[kTiles][4], int first, const int (&last)[2], int window,
                            int prefix) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = first + n * 8 + lane % 4 * 2 + e % 2;
      const bool visible = (key <= last[e / 2] && key > last[e / 2] - window) || key < prefix;
      if (!visible) score[n][e] = kMinusInfinity;
    }
  }
}

// Turns scores into weights and takes them into the rows' statistics; `keep` is what earlier sums
// are to be multiplied by.
template <int kTiles>
IVR_DEVICE void weigh_scores(float (&score)[kTiles][4], float (&top)[2], float (&sum)[2],
                             float scale, float (&keep)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = kMinusInfinity;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      largest = fmaxf(largest, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
    }
    // Rounded before it is compared or subtracted: where nothing is larger, `keep` is exactly 1.
    largest = fmaxf(top[h], multiply_rounded(quad_max(largest), scale));
    const float base = largest == kMinusInfinity ? 0.0f : largest;
    keep[h] = exp2_fast(top[h] - base);
    top[h] = largest;
    float more = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        score[n][e] = exp2_fast(score[n][e] * scale - base);
        more += score[n][e];
      }
    }
    sum[h] = sum[h] * keep[h] + more;
  }
}

template <int kTiles>
IVR_DEVICE void scale_rows(float (&out)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[n][e] *= factor[e / 2];
  }
}

// Weights of keys [16 n, 16 n + 16) as an a fragment.
template <int kTiles>
IVR_DEVICE void pack_weights(const float (&weight)[kTiles][4], int n, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* pair = &weight[2 * n + i / 2][i % 2 * 2];
    a[i] = pack_bf16(pair[0], pair[1]);
  }
}

// Takes a tile of kKeys keys, the first of which is key `first` of the sequence. Keys from `end` on
// exist for nobody; masked: not every row sees every key.
template <int kD, int kRowTiles, int kKeys>
IVR_DEVICE void attend_tile(AttentionState<kD, kRowTiles>& s, Shared<bf16> k_tile,
                            Shared<bf16> v_tile, int first, int end, bool masked, int window,
                            int prefix, float scale) {
  constexpr int kGroups = kKeys / 16;
  const int groups = min(kGroups, (end - first + 15) / 16);

  float score[kRowTiles][kKeys / 8][4];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int e = 0; e < 8; ++e) score[r][2 * n + e / 4][e % 4] = 0.0f;
    }
    if (n >= groups) continue;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t b[4];
      load_b<kD>(b, k_tile, n * 16, k);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma(score[r][2 * n], s.q[r][k], {b[0], b[1]});
        mma(score[r][2 * n + 1], s.q[r][k], {b[2], b[3]});
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    if (masked) mask_scores(score[r], first, s.last[r], window, prefix);
    float keep[2];
    weigh_scores(score[r], s.top[r], s.sum[r], scale, keep);
    scale_rows(s.out[r], keep);
  }

#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    if (n >= groups) continue;
    uint32_t weight[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) pack_weights(score[r], n, weight[r]);
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
      uint32_t b[4];
      load_b_transposed<kD>(b, v_tile, n * 16, d);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma(s.out[r][2 * d], weight[r], {b[0], b[1]});
        mma(s.out[r][2 * d + 1], weight[r], {b[2], b[3]});
      }
    }
  }
}

// ---- the end of a row ---------------------------------------------------------------------------

// Factor that turns a row's output sum into the output; a sink takes its share here.
IVR_DEVICE float finish_factor(const AttentionParams& a, int head, float top, float sum) {
  float factor = 1.0f;
  if (a.sinks != nullptr) {
    const float sink = load_float(a.sinks, head, a.sinks_dtype == DType::f32) * kLog2E;
    const float largest = fmaxf(top, sink);
    factor = exp2_fast(top - largest);
    sum = sum * factor + exp2_fast(sink - largest);
  }
  return sum == 0.0f ? 0.0f : factor / sum;
}

template <int kD, int kRowTiles>
IVR_DEVICE void store_rows(const AttentionParams& a, const AttentionRows& rows, int kv_head,
                           int first_row, const AttentionState<kD, kRowTiles>& s) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(s.sum[r][h]);
      const int row = lane_row(first_row, r, h);
      if (row >= rows.row_count()) continue;
      const int head = kv_head * rows.group + row % rows.group;
      const float factor = finish_factor(a, head, s.top[r][h], sum);
      bf16* out = static_cast<bf16*>(a.out) + query_offset(rows, kv_head, row, a.out_t, a.out_h) +
                  threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        store_raw(out + n * 8,
                  pack_bf16(s.out[r][n][2 * h] * factor, s.out[r][n][2 * h + 1] * factor));
      }
    }
  }
}

// ---- a block of rows, all their keys ------------------------------------------------------------

constexpr int kAttentionKeys = 64;
constexpr int kAttentionStages = 2;

// With head dim 64 a warp takes two tiles of 16 rows, so that every fragment of K and V that it
// fetches from shared memory is used twice; with 128 the registers do not allow it.
template <int kD>
constexpr int kAttentionRowTiles = kD == 64 ? 2 : 1;
template <int kD>
constexpr int kAttentionBlockRows = kAttentionWarps * 16 * kAttentionRowTiles<kD>;
template <int kD>
constexpr size_t kAttentionSharedBytes = sizeof(bf16) * 2 * kAttentionStages * kAttentionKeys * kD;

// tiles: kAttentionSharedBytes<kD>. The next tile is on its way while one is worked on.
template <int kD, class Source>
IVR_DEVICE void attention_block(const AttentionParams& a, const AttentionRows& rows, int kv_head,
                                const Source& source, Shared<bf16> tiles) {
  constexpr int kRowTiles = kAttentionRowTiles<kD>;
  constexpr int kTile = kAttentionKeys * kD;
  const int thread = threadIdx.x;
  const int first_row = rows.first_row + thread / kWarpSize * 16 * kRowTiles;
  const AttentionKeys keys = visible_keys<kAttentionBlockRows<kD>>(rows);
  const float scale = a.scale * kLog2E;
  const auto ask = [&](int first, int stage) {
    const Shared<bf16> k_tile = tiles + 2 * stage * kTile;
    load_tile<kD, kAttentionKeys, kAttentionThreads>(source, first, keys.begin, keys.end, k_tile,
                                                     k_tile + kTile, thread);
    commit_copies();
  };

  int first = keys.begin / kAttentionKeys * kAttentionKeys, stage = 0;
  if (first < keys.end) ask(first, 0);
  AttentionState<kD, kRowTiles> s;
  begin_rows(a, rows, kv_head, first_row, s);
  for (; first < keys.end; first += kAttentionKeys, stage ^= 1) {
    wait_copies<0>();
    __syncthreads();
    const int next = first + kAttentionKeys;
    if (next < keys.end) ask(next, stage ^ 1);
    const bool whole = next <= keys.end && ((first >= keys.whole_begin && next <= keys.whole_end) ||
                                            next <= rows.prefix);
    // Warps behind the last row wait for the others.
    if (first_row < rows.row_count()) {
      const Shared<bf16> k_tile = tiles + 2 * stage * kTile;
      attend_tile<kD, kRowTiles, kAttentionKeys>(s, k_tile, k_tile + kTile, first, keys.end, !whole,
                                                 rows.window, rows.prefix, scale);
    }
  }
  if (first_row < rows.row_count()) store_rows(a, rows, kv_head, first_row, s);
}

// ---- plain multiply-adds ------------------------------------------------------------------------

constexpr int kPlainRows = 4;  // of a warp: each key and value that it fetches is used so often
constexpr int kPlainBlockRows = kPlainRows * kAttentionWarps;

// A warp's rows, no shared memory and no barrier: scores with a key per lane, outputs with four
// columns per lane.
template <typename T, class Source>
IVR_DEVICE void plain_attention_rows(const AttentionParams& a, const AttentionRows& rows,
                                     int kv_head, const Source& source) {
  constexpr int kQuads = kAttentionMaxHeadDim / 4 / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int D = static_cast<int>(a.D);
  const AttentionKeys keys = visible_keys<kPlainBlockRows>(rows);
  const int first_row = rows.first_row + static_cast<int>(threadIdx.x) / kWarpSize * kPlainRows;
  if (first_row >= rows.row_count()) return;
  const float scale = a.scale * kLog2E;

  const T* q[kPlainRows];
  int last[kPlainRows];
  float top[kPlainRows], sum[kPlainRows], out[kPlainRows][kQuads][4];
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    const int row = min(first_row + r, rows.row_count() - 1);
    q[r] = static_cast<const T*>(a.q) + query_offset(rows, kv_head, row, a.q_t, a.q_h);
    last[r] = rows.last_key(row / rows.group);
    top[r] = kMinusInfinity;
    sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kQuads * 4; ++i) out[r][i / 4][i % 4] = 0.0f;
  }

  for (int first = keys.begin / kWarpSize * kWarpSize; first < keys.end; first += kWarpSize) {
    const int key = first + lane;
    const T *k_row = source.k, *v_row = source.v;
    const bool wanted = key >= keys.begin && key < keys.end;
    const bool found = wanted && source.locate(key, k_row, v_row);
    float score[kPlainRows] = {};
    if (found) {
      for (int d = 0; d < D; d += 4) {
        float k[4];
        load_quad(k_row + d, k);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) {
          float x[4];
          load_quad(q[r] + d, x);
#pragma unroll
          for (int i = 0; i < 4; ++i) score[r] += k[i] * x[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      const bool visible = (key <= last[r] && key > last[r] - rows.window) || key < rows.prefix;
      score[r] = !wanted || !visible ? kMinusInfinity
                 : found             ? multiply_rounded(score[r], scale)
                                     : kNaN;
      float largest = score[r];
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, offset));
      }
      largest = fmaxf(top[r], largest);
      const float base = largest == kMinusInfinity ? 0.0f : largest;
      const float keep = exp2_fast(top[r] - base);
      top[r] = largest;
      score[r] = exp2_fast(score[r] - base);
      sum[r] = sum[r] * keep + score[r];
#pragma unroll
      for (int i = 0; i < kQuads * 4; ++i) out[r][i / 4][i % 4] *= keep;
    }
    const int count = min(kWarpSize, keys.end - first);
    for (int j = 0; j < count; ++j) {
      const bool there = first + j >= keys.begin && source.locate(first + j, k_row, v_row);
      float v[kQuads][4] = {};
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const int d = (lane + i * kWarpSize) * 4;
        if (there && d < D) load_quad(v_row + d, v[i]);
      }
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) {
        const float weight = __shfl_sync(kFullMask, score[r], j);
#pragma unroll
        for (int i = 0; i < kQuads * 4; ++i) out[r][i / 4][i % 4] += weight * v[i / 4][i % 4];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    const float whole = warp_sum(sum[r], kWarpSize);
    const int row = first_row + r;
    if (row >= rows.row_count()) continue;
    const int head = kv_head * rows.group + row % rows.group;
    const float factor = finish_factor(a, head, top[r], whole);
    T* to = static_cast<T*>(a.out) + query_offset(rows, kv_head, row, a.out_t, a.out_h);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int d = (lane + i * kWarpSize) * 4;
#pragma unroll
      for (int e = 0; e < 4; ++e) out[r][i][e] *= factor;
      if (d < D) store_quad(to + d, out[r][i]);
    }
  }
}

}  // namespace ivr::cuda
