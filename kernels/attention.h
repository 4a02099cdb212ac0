// What flash_attention and paged_attention have in common: everything but where K and V lie.
//
// The bits of an output row depend on the row's query and on the keys that it sees, and on nothing
// else: not on the other queries of the call, the batch, the threads or the memory layout.
// Keys are taken in chunks of kAttentionChunk absolute positions; a score is one chain of fused
// multiply-adds over d, a chunk's output one over its keys, and chunks are merged in ascending
// order. Where the instruction set has products of bf16 pairs (dot products, matrix tiles), bf16 is
// multiplied by those: pairs along d, and pairs of keys from the chunk's first on; tiles take 16
// pairs at a time, in chains of their own (kernels/cpu/amx.h). The weights of V are rounded to bf16
// for it, their sum is not.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

constexpr int64_t kAttentionChunk = 256;
constexpr int64_t kAttentionMaxHeadDim = 256;
constexpr int64_t kAttentionNoWindow = INT64_MAX;

// Work for one thread: rows [first_row, end_row) of one sequence and kv head, where
// row = query * group + head within the group, so that a group's heads share the packed keys.
struct AttentionItem {
  int32_t sequence, kv_head;
  int64_t first_row, end_row;
};

struct AttentionParams {
  const void* q;          // [T, H, D]
  void* out;              // [T, H, D]; may be q
  const void* sinks;      // [H] or null: a logit per head that takes weight and gives no value
  const int32_t* cu_q;    // [B + 1]: queries cu_q[b] .. cu_q[b + 1] belong to sequence b
  const int32_t* prefix;  // [B] or null: the first prefix[b] keys are visible to every query
  int64_t T, B, K;        // queries, sequences, kv heads
  int64_t q_t, q_h, out_t, out_h;  // strides in elements
  int64_t D;                       // a multiple of 4 in [4, kAttentionMaxHeadDim]
  int64_t group;                   // query heads per kv head
  int64_t window;                  // keys a query sees, itself included; or kAttentionNoWindow
  float scale;                     // finite, > 0
  bool causal;                     // the last query is aligned with the last key
  DType dtype;                     // f32 or bf16: q, out, K and V
  DType sinks_dtype;               // f32 or bf16
};

constexpr int64_t attention_padded(int64_t D) { return (D + 15) / 16 * 16; }

// Most rows of an item: queries and outputs of an item, K and V of a chunk stay in a 1 MB L2. A
// head of a tile of the ViT (1025 x 64) is one item: its K and V, far apart in memory, are packed
// once.
constexpr int64_t attention_rows(int64_t D) {
  const int64_t rows = 1050 * 64 / attention_padded(D) / 42 * 42;
  return rows > 1050 ? 1050 : rows;
}

// Floats of scratch memory (64-byte aligned) that a thread needs: see kernels/cpu/attention_core.h.
// Of a block of rows it keeps a maximum and a sum, 16 of each for 4 rows or more, and scores, of
// two blocks of 32 on tiles.
constexpr int64_t attention_scratch(int64_t D) {
  const int64_t rows = attention_rows(D) + 16, wide = attention_padded(D);
  return 2 * rows * wide + 2 * kAttentionChunk * wide + 2 * 4 * rows +
         2 * 32 * (kAttentionChunk + 16);
}

// CUDA: tensor cores where they fit, plain multiply-adds for the rest.
inline bool attention_on_tensor_cores(const AttentionParams& a) {
  return a.dtype == DType::bf16 && (a.D == 64 || a.D == 128);
}

// CUDA: elements whose multiple every address and stride of q, K, V and out has to be.
inline int64_t attention_alignment(const AttentionParams& a) {
  return attention_on_tensor_cores(a) ? 8 : 4;
}

}  // namespace ivr
