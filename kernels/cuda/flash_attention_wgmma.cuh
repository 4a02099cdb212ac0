// flash_attention on sm_90a: warpgroups, wgmma, bulk tensor copies (rows, keys, softmax and bits as
// attention_core.cuh has them; pipeline after Shah et al., FlashAttention-3, 2024).
//
// Mapping    a block takes a kv head and 192 rows (head dim 64) or 128 (128). One warp asks for
//            tiles of 128 keys and values, three or two warpgroups of 64 rows work on them. A
//            warpgroup without rows leaves at once, and a last tile of up to 16 or 64 keys is
//            multiplied as such: 1025 tokens are 1088 rows and 1040 keys, not 1152 squared.
// Overlap    the scores of a tile are multiplied beside the weighted values of the tile before, and
//            the warpgroups take turns at asking for both: one's softmax runs beside the others'
//            products.
// Operands   the weights stay in registers; Q, K and V come from shared memory.
// Bytes      as flash_attention.cuh.
#pragma once

#include "kernels/cuda/attention_core.cuh"
#include "kernels/flash_attention.h"

namespace ivr::cuda {

constexpr int kWarpgroup = 4 * kWarpSize;
constexpr int kWgmmaRows = 64;  // of a warpgroup

// Warpgroups that multiply. With head dim 128 the registers allow two.
template <int kD>
constexpr int kWgmmaWorkers = kD == 64 ? 3 : 2;
template <int kD>
constexpr int kWgmmaBlockRows = kWgmmaWorkers<kD> * kWgmmaRows;
template <int kD>
constexpr int kWgmmaThreads = kWarpgroup * (1 + kWgmmaWorkers<kD>);
// Registers of a thread that copies, and of one that multiplies.
template <int kD>
constexpr int kCopyRegisters = kD == 64 ? 32 : 24;
template <int kD>
constexpr int kMultiplyRegisters = kD == 64 ? 160 : 240;

constexpr int kWgmmaKeys = 128;
constexpr int kTurnBarrier = 1, kQueriesBarrier = 4;  // the first of a warpgroup each
constexpr int kWgmmaColumns = 64;  // of a swizzled row; head dim 128 lies in two halves

// Tiles of K or V that are there or on their way.
template <int kD>
constexpr int kWgmmaSlots = kD == 64 ? 8 : 6;
template <int kD>
constexpr size_t kWgmmaSharedBytes =
    sizeof(bf16) * kD * (kWgmmaSlots<kD> * kWgmmaKeys + kWgmmaBlockRows<kD>);

template <typename Map>
struct KeyMaps {
  Map k, v;
};

// The boxes of K and V that are copied: 64 columns of a head, kWgmmaKeys keys.
inline KeyMaps<TensorBox> key_boxes(const FlashAttentionParams& p) {
  const auto box = [&p](const void* base, int64_t stride_t, int64_t stride_h) {
    constexpr int64_t kSize = sizeof(bf16);
    // The stride of a dimension of size 1 is never used, but has to be a valid one.
    return TensorBox{
        base,
        3,
        {p.a.D, p.a.K, p.keys},
        {kSize, (p.a.K > 1 ? stride_h : p.a.D) * kSize, (p.keys > 1 ? stride_t : p.a.D) * kSize},
        {kWgmmaColumns, 1, kWgmmaKeys},
        Swizzle::bytes128};
  };
  return {box(p.k, p.k_t, p.k_h), box(p.v, p.v_t, p.v_h)};
}

// ---- device -------------------------------------------------------------------------------------

// Tiles on their way from the warp that asks to the warpgroups that use them: tile 2 i has the keys
// of step i, tile 2 i + 1 its values.
template <int kD>
struct KeyRing {
  static constexpr int kSlots = kWgmmaSlots<kD>, kTile = kWgmmaKeys * kD;
  Shared<bf16> tiles, queries;
  Shared<Barrier> full, empty;

  IVR_DEVICE Shared<bf16> tile(int i) const { return tiles + i % kSlots * kTile; }
  IVR_DEVICE void wait_full(int i) const { barrier_wait(full + i % kSlots, i / kSlots); }
  IVR_DEVICE void wait_empty(int i) const { barrier_wait(empty + i % kSlots, i / kSlots - 1); }
  // By all lanes of a warp that has read the tile.
  IVR_DEVICE void release(int i) const {
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(empty + i % kSlots);
  }
};

// The tiles that a block's rows see: `count` of them from key `first` on. Of the last one `there`
// keys exist and `multiplied` are worked on: 16, 64 or all.
struct KeySteps {
  int first, count, there, multiplied;
};

IVR_DEVICE KeySteps key_steps(const AttentionKeys& keys) {
  KeySteps steps{keys.begin / kWgmmaKeys * kWgmmaKeys, 0, 0, 0};
  if (keys.end <= keys.begin) return steps;
  steps.count = (keys.end - steps.first + kWgmmaKeys - 1) / kWgmmaKeys;
  steps.there = keys.end - steps.first - (steps.count - 1) * kWgmmaKeys;
  steps.multiplied = steps.there <= 16 ? 16 : steps.there <= 64 ? 64 : kWgmmaKeys;
  return steps;
}

// One warp. `begin`: the sequence's first key in K and V.
template <int kD>
IVR_DEVICE void load_keys(const KeyMaps<TensorMap>& maps, const KeyRing<kD>& ring, int kv_head,
                          int begin, const AttentionKeys& keys, Shared<Barrier> cleared) {
  const int lane = threadIdx.x % kWarpSize;
  const KeySteps steps = key_steps(keys);
  const int last = 2 * steps.count - 1;
  if (lane == 0) {
    for (int i = 0; i <= last; ++i) {
      const Shared<Barrier> full = ring.full + i % ring.kSlots;
      const int key = begin + steps.first + i / 2 * kWgmmaKeys;
      ring.wait_empty(i);
      barrier_expect(full, sizeof(bf16) * ring.kTile);
#pragma unroll
      for (int d = 0; d < kD; d += kWgmmaColumns) {
        copy_tensor(ring.tile(i) + d * kWgmmaKeys, i % 2 == 0 ? maps.k : maps.v, {d, kv_head, key},
                    full);
      }
    }
  }
  __syncwarp();
  if (steps.there == steps.multiplied) return;
  // Behind the last key lie the values of another sequence: a weight of zero would let a NaN of
  // theirs through.
  ring.wait_full(last);
  const int chunks = (steps.multiplied - steps.there) * (kD / 8);
  for (int i = lane; i < chunks; i += kWarpSize) {
    const int row = steps.there + i / (kD / 8), chunk = i % (kD / 8);
    const int at = chunk / 8 * kWgmmaKeys * kWgmmaColumns + row * kWgmmaColumns + chunk % 8 * 8;
    store16_shared(ring.tile(last) + at, Vec<bf16>{});
  }
  fence_async_reads();
  barrier_arrive(cleared);
}

// A warpgroup's queries, laid out as bulk copies lay keys.
template <int kD>
IVR_DEVICE void stage_queries(const AttentionParams& a, const AttentionRows& rows, int kv_head,
                              int first_row, Shared<bf16> tile) {
  constexpr int kChunks = kD / 8;
#pragma unroll
  for (int i = 0; i < kWgmmaRows * kChunks / kWarpgroup; ++i) {
    const int at = static_cast<int>(threadIdx.x % kWarpgroup) + i * kWarpgroup;
    const int row = at / kChunks, chunk = at % kChunks;
    // Rows behind the last repeat it and are never written.
    const int from = min(first_row + row, rows.row_count() - 1);
    const bf16* q =
        static_cast<const bf16*>(a.q) + query_offset(rows, kv_head, from, a.q_t, a.q_h) + chunk * 8;
    store16_shared(
        tile + chunk / 8 * kWgmmaRows * kWgmmaColumns + tile_offset<kWgmmaColumns>(row, chunk % 8),
        load16(q));
  }
  fence_async_reads();
}

// One warpgroup, the first row of which exists: `worker` of `workers` that have rows.
template <int kD>
IVR_DEVICE void attend_keys(const AttentionParams& a, const AttentionRows& rows, int kv_head,
                            const KeyRing<kD>& ring, const AttentionKeys& keys,
                            Shared<Barrier> cleared, int worker, int workers) {
  constexpr int kGroups = kWgmmaKeys / 16;
  constexpr int kEight = 8 * kWgmmaColumns * sizeof(bf16);  // bytes of eight rows
  constexpr int kHalf = kWgmmaKeys * kWgmmaColumns;
  const int warp = static_cast<int>(threadIdx.x % kWarpgroup) / kWarpSize;
  const int first_row = rows.first_row + worker * kWgmmaRows;
  const Shared<bf16> queries = ring.queries + worker * kWgmmaRows * kD;
  const KeySteps steps = key_steps(keys);
  const float scale = a.scale * kLog2E;
  AttentionState<kD, 1> s;
  begin_sums(rows, first_row + warp * 16, s);
  stage_queries<kD>(a, rows, kv_head, first_row, queries);
  named_barrier_sync(kQueriesBarrier + worker, kWarpgroup);
  uint32_t weight[kGroups][4] = {};
  float keep[2] = {};

  // Both products run until they are waited for. kKeys: of the tile, kWgmmaKeys unless it is the
  // last one.
  const auto multiply_keys = [&]<int kKeys>(float (&score)[kKeys / 8][4], int i) {
    ring.wait_full(2 * i);
    const Shared<bf16> tile = ring.tile(2 * i);
    wgmma_fence(score);
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      const int half = k / 4, column = k % 4 * 16;
      wgmma<kKeys, false>(
          score,
          matrix_descriptor(queries + half * kWgmmaRows * kWgmmaColumns + column, 16, kEight),
          matrix_descriptor(tile + half * kHalf + column, 16, kEight), k > 0);
    }
    wgmma_commit();
  };
  const auto multiply_values = [&]<int kKeys>(int i) {
    scale_rows(s.out[0], keep);
    ring.wait_full(2 * i + 1);
    if (i + 1 == steps.count && steps.there < steps.multiplied) barrier_wait(cleared, 0);
    const Shared<bf16> tile = ring.tile(2 * i + 1);
    wgmma_fence(s.out[0], weight);
#pragma unroll
    for (int group = 0; group < kKeys / 16; ++group) {
      wgmma<kD, true>(s.out[0], weight[group],
                      matrix_descriptor(tile + group * 16 * kWgmmaColumns,
                                        kHalf * static_cast<int>(sizeof(bf16)), kEight),
                      true);
    }
    wgmma_commit();
  };
  const auto step = [&]<bool kFirst, int kKeys>(int i) {
    if (workers > 1) named_barrier_sync(kTurnBarrier + worker, 2 * kWarpgroup);
    float score[kKeys / 8][4] = {};
    multiply_keys.template operator()<kKeys>(score, i);
    if constexpr (!kFirst) multiply_values.template operator()<kWgmmaKeys>(i - 1);
    // Nobody waits for a turn after the last worker's last.
    if (workers > 1 && (worker + 1 < workers || i + 1 < steps.count)) {
      named_barrier_arrive(kTurnBarrier + (worker + 1 < workers ? worker + 1 : 0), 2 * kWarpgroup);
    }
    wgmma_wait<kFirst ? 0 : 1>(score);
    ring.release(2 * i);

    const int first = steps.first + i * kWgmmaKeys, next = first + kWgmmaKeys;
    const bool whole = next <= keys.end && ((first >= keys.whole_begin && next <= keys.whole_end) ||
                                            next <= rows.prefix);
    if (!whole) mask_scores(score, first, s.last[0], rows.window, rows.prefix);
    weigh_scores(score, s.top[0], s.sum[0], scale, keep);
    if constexpr (!kFirst) {
      wgmma_wait<0>(s.out[0]);
      ring.release(2 * i - 1);
    }
#pragma unroll
    for (int group = 0; group < kKeys / 16; ++group) pack_weights(score, group, weight[group]);
  };
  // The last tile and whatever is still to be multiplied.
  const auto finish = [&]<int kKeys>() {
    const int last = steps.count - 1;
    last == 0 ? step.template operator()<true, kKeys>(0)
              : step.template operator()<false, kKeys>(last);
    multiply_values.template operator()<kKeys>(last);
    wgmma_wait<0>(s.out[0]);
  };

  if (steps.count > 0) {
    if (workers > 1 && worker + 1 == workers) named_barrier_arrive(kTurnBarrier, 2 * kWarpgroup);
    if (steps.count > 1) step.template operator()<true, kWgmmaKeys>(0);
    for (int i = 1; i + 1 < steps.count; ++i) step.template operator()<false, kWgmmaKeys>(i);
    if (steps.multiplied == 16) {
      finish.template operator()<16>();
    } else if (steps.multiplied == 64) {
      finish.template operator()<64>();
    } else {
      finish.template operator()<kWgmmaKeys>();
    }
  }
  store_rows(a, rows, kv_head, first_row + warp * 16, s);
}

template <int kD>
IVR_DEVICE void flash_attention_wgmma_block(const FlashAttentionParams& p,
                                            const KeyMaps<TensorMap>& maps) {
  constexpr int kSlots = kWgmmaSlots<kD>;
  IVR_DYNAMIC_SHARED(bf16, tiles);
  IVR_SHARED(Barrier, barriers, 2 * kSlots + 1);
  const KeyRing<kD> ring{tiles, tiles + kSlots * KeyRing<kD>::kTile, barriers, barriers + kSlots};
  const Shared<Barrier> cleared = barriers + 2 * kSlots;

  // Heads first: a sequence's last block, which may have few rows, starts when the others run.
  const auto heads = static_cast<unsigned>(p.a.K);
  const int kv_head = static_cast<int>(blockIdx.x % heads);
  const unsigned block = blockIdx.x / heads;
  // Causal blocks at the end of a sequence see the most keys and come first.
  const unsigned index = p.a.causal ? gridDim.x / heads - 1 - block : block;
  AttentionRows rows = find_rows<kWgmmaBlockRows<kD>>(p.a, static_cast<int>(index));
  if (rows.sequence < 0) return;
  const int first_key = load_raw<int32_t>(p.cu_kv + rows.sequence);
  describe_rows(p.a, load_raw<int32_t>(p.cu_kv + rows.sequence + 1) - first_key, rows);
  const AttentionKeys keys = visible_keys<kWgmmaBlockRows<kD>>(rows);
  const int workers =
      min(kWgmmaWorkers<kD>, (rows.row_count() - rows.first_row + kWgmmaRows - 1) / kWgmmaRows);

  const int i = static_cast<int>(threadIdx.x), warps = workers * kWarpgroup / kWarpSize;
  if (i <= 2 * kSlots) {
    barrier_init(barriers + i, i < kSlots ? 1 : i < 2 * kSlots ? warps : kWarpSize);
  }
  __syncthreads();

  // The same for a whole warp, and the compiler is told so.
  const int role = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (role == 0) {
    give_up_registers<kCopyRegisters<kD>>();
    if (threadIdx.x < kWarpSize) load_keys<kD>(maps, ring, kv_head, first_key, keys, cleared);
  } else {
    take_registers<kMultiplyRegisters<kD>>();
    if (role <= workers) {
      attend_keys<kD>(p.a, rows, kv_head, ring, keys, cleared, role - 1, workers);
    }
  }
}

}  // namespace ivr::cuda
