// flash_attention: softmax(scale * q k^T) v over sequences that lie one behind the other.
#pragma once

#include "kernels/attention.h"

namespace ivr {

struct FlashAttentionParams {
  AttentionParams a;
  const void* k;         // [Tkv, K, D]
  const void* v;         // [Tkv, K, D]
  const int32_t* cu_kv;  // [B + 1]
  int64_t keys;          // Tkv
  int64_t k_t, k_h;      // strides in elements
  int64_t v_t, v_h;
};

// The kernels of CUDA: plain multiply-adds, tensor cores of a warp, tensor cores of a warpgroup.
enum class AttentionVariant { plain, mma, wgmma };
constexpr int kAttentionVariants = 3;

constexpr const char* name_of(AttentionVariant variant) {
  constexpr const char* kNames[] = {"plain", "mma", "wgmma"};
  return kNames[static_cast<int>(variant)];
}

IVR_CPU_KERNEL(flash_attention, const FlashAttentionParams& p, const AttentionItem* items,
               float* scratch, int64_t begin, int64_t end)
IVR_DOT_KERNEL(flash_attention, const FlashAttentionParams& p, const AttentionItem* items,
               float* scratch, int64_t begin, int64_t end)  // bf16
IVR_AMX_KERNEL(flash_attention, const FlashAttentionParams& p, const AttentionItem* items,
               float* scratch, int64_t begin, int64_t end)  // bf16

}  // namespace ivr
