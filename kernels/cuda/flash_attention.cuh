// flash_attention on the GPU (contract: kernels/flash_attention.h; method: attention_core.cuh): the
// variants for every device, and which one is taken. flash_attention_wgmma.cuh has Hopper's.
//
// Mapping    a block takes a kv head and 128 rows (head dim 64) or 64 rows (128), 16 (plain path).
//            Work is counted in 16 rows a warp and 16 keys a step: 1025 tokens are 9 row blocks,
//            the last of which keeps one warp busy, and a last key step of one group, not 1152
//            squared.
// Limits     addresses and strides are multiples of 8 elements (tensor cores) or 4 (plain).
// Bytes      T * H * D * 4 + blocks * keys seen * D * 4 (K and V come from L2 after the first
// block).
#pragma once

#include <cstdio>

#include "kernels/cuda/attention_core.cuh"
#include "kernels/cuda/flash_attention_wgmma.cuh"
#include "kernels/flash_attention.h"

namespace ivr::cuda {

struct FlashAttentionConfig {
  AttentionVariant variant;
  int head_dim;  // of the tensor core kernels; 0: the plain one
  int rows;      // of a block
  size_t shared_bytes;
  unsigned blocks;  // times kv heads
};

inline bool flash_attention_supported(const FlashAttentionParams& p) {
  return attention_supported(p.a);
}

// capability: 90 where sm_90a code may run, 80 otherwise.
inline FlashAttentionConfig flash_attention_config(const FlashAttentionParams& p, int capability) {
  using enum AttentionVariant;
  FlashAttentionConfig c{plain, 0, kPlainBlockRows, 0, 0};
  if (attention_on_tensor_cores(p.a)) {
    const bool narrow = p.a.D == 64;
    c.head_dim = static_cast<int>(p.a.D);
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    // Its blocks are counted in one dimension, and a tensor map describes at least one key.
    const int rows = narrow ? kWgmmaBlockRows<64> : kWgmmaBlockRows<128>;
    const bool fits = attention_row_blocks(p.a, rows) * p.a.K <= kMax && p.keys > 0;
    if (capability >= 90 && fits) {
      c.variant = wgmma;
      c.rows = rows;
      c.shared_bytes = narrow ? kWgmmaSharedBytes<64> : kWgmmaSharedBytes<128>;
    } else {
      c.variant = mma;
      c.rows = narrow ? kAttentionBlockRows<64> : kAttentionBlockRows<128>;
      c.shared_bytes = narrow ? kAttentionSharedBytes<64> : kAttentionSharedBytes<128>;
    }
  }
  c.blocks = attention_row_blocks(p.a, c.rows);
  return c;
}

inline int format(const FlashAttentionConfig& c, char* out, size_t size) {
  return std::snprintf(out, size, "%s head_dim=%d rows=%d shared=%zu blocks=%u", name_of(c.variant),
                       c.head_dim, c.rows, c.shared_bytes, c.blocks);
}

// For variants other than wgmma: returns f.template operator()<T, kD>(), kD = 0 for the plain
// kernel.
template <typename F>
auto with_flash_attention_kernel(DType dtype, const FlashAttentionConfig& c, F&& f) {
  if (c.head_dim == 64) return f.template operator()<bf16, 64>();
  if (c.head_dim == 128) return f.template operator()<bf16, 128>();
  return dtype == DType::f32 ? f.template operator()<float, 0>() : f.template operator()<bf16, 0>();
}

// ---- device -------------------------------------------------------------------------------------

template <typename T, int kD>
IVR_DEVICE void flash_attention_block(const FlashAttentionParams& p) {
  constexpr int kRows = kD == 0 ? kPlainBlockRows : kAttentionBlockRows<kD>;
  // Causal blocks at the end of a sequence see the most keys and come first.
  const unsigned index = p.a.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  AttentionRows rows = find_rows<kRows>(p.a, static_cast<int>(index));
  if (rows.sequence < 0) return;
  const int first_key = load_raw<int32_t>(p.cu_kv + rows.sequence);
  describe_rows(p.a, load_raw<int32_t>(p.cu_kv + rows.sequence + 1) - first_key, rows);
  const int kv_head = static_cast<int>(blockIdx.y);
  const DenseKeys<T> source{static_cast<const T*>(p.k) + first_key * p.k_t + kv_head * p.k_h,
                            static_cast<const T*>(p.v) + first_key * p.v_t + kv_head * p.v_h, p.k_t,
                            p.v_t};
  if constexpr (kD == 0) {
    plain_attention_rows<T>(p.a, rows, kv_head, source);
  } else {
    IVR_DYNAMIC_SHARED(bf16, tiles);
    attention_block<kD>(p.a, rows, kv_head, source, tiles);
  }
}

}  // namespace ivr::cuda
