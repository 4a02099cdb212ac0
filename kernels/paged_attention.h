// paged_attention: causal attention over keys and values that lie in pages. Key j of sequence b is
// row j % P of page page_table[b, j / P].
#pragma once

#include "kernels/attention.h"

namespace ivr {

struct PagedAttentionParams {
  AttentionParams a;
  const void* k_cache;        // [pages, K, P, D]
  const void* v_cache;        // [pages, K, P, D]
  const int32_t* page_table;  // [B, max_pages]
  const int32_t* kv_lens;     // [B]
  int64_t pages, max_pages;   // of the caches, of a row of the table
  int64_t page_table_b;       // strides in elements
  int64_t k_page, k_h, k_p;
  int64_t v_page, v_h, v_p;
  int page_shift;  // P = 1 << page_shift
  // CUDA, decode steps: partial results of the key splits, 16-byte aligned. Null: a block walks all
  // of its rows' keys.
  float* workspace;
};

IVR_CPU_KERNEL(paged_attention, const PagedAttentionParams& p, const AttentionItem* items,
               float* scratch, int64_t begin, int64_t end)
IVR_DOT_KERNEL(paged_attention, const PagedAttentionParams& p, const AttentionItem* items,
               float* scratch, int64_t begin, int64_t end)  // bf16
IVR_AMX_KERNEL(paged_attention, const PagedAttentionParams& p, const AttentionItem* items,
               float* scratch, int64_t begin, int64_t end)  // bf16

}  // namespace ivr
