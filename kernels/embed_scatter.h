// embed_scatter: one row per token, from the embedding table or, where a picture stands, from the
// image features. A gather: no arithmetic, 2 * T * C * size bytes moved.
//
// On the CPU the caller has checked every id and image row. On a GPU nobody has: a token whose id
// or image row is out of range gets a row of NaN, so that its request, and no other, fails later.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/dtype.h"

namespace ivr {

struct EmbedScatterParams {
  const int64_t* ids;        // [T], read where image_row < 0
  const int64_t* image_row;  // [T] or null: row of `image` for this token, negative for text
  const void* table;         // [V, C], rows table_v elements apart
  const void* image;         // [N, C], rows image_n elements apart, or null
  void* out;                 // [T, C], rows out_t elements apart
  int64_t T, V, N, C;
  int64_t table_v, image_n, out_t;
  DType dtype;
};

// Tokens [begin, end).
IVR_CPU_KERNEL(embed_scatter, const EmbedScatterParams& p, int64_t begin, int64_t end)

}  // namespace ivr
