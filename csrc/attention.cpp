#include "csrc/attention.h"

#include <algorithm>
#include <cmath>

#include "csrc/parallel.h"

namespace ivr {

AttentionParams attention_params(Checker& check, const Tensor& q, const Tensor& out,
                                 const Tensor& cu_q, const AttentionOptions& options) {
  check.tensor("out", out, {q.dtype}, {"T", "H", "D"});
  check.tensor("cu_q", cu_q, {DType::i32}, {"B+1"});
  check.require(check["B+1"] >= 1, "cu_q is empty, expected B+1 >= 1 offsets");
  check.bind("B", check["B+1"] - 1, "cu_q");
  const int64_t D = check["D"], H = check["H"], K = check["K"];
  check.require(D >= 4 && D % 4 == 0 && D <= kAttentionMaxHeadDim, "head dim D is ", D,
                ", allowed: multiples of 4 from 4 to ", kAttentionMaxHeadDim);
  check.require(K >= 1 && H % K == 0, "H = ", H, " query heads is no multiple of K = ", K,
                " kv heads");
  check.require(std::isfinite(options.scale) && options.scale > 0, "scale is ", options.scale,
                ", expected a finite number > 0");
  AttentionParams p{.q = q.data,
                    .out = out.data,
                    .sinks = nullptr,
                    .cu_q = static_cast<const int32_t*>(cu_q.data),
                    .prefix = nullptr,
                    .T = check["T"],
                    .B = check["B"],
                    .K = K,
                    .q_t = q.stride(0),
                    .q_h = q.stride(1),
                    .out_t = out.stride(0),
                    .out_h = out.stride(1),
                    .D = D,
                    .group = H / K,
                    .window = kAttentionNoWindow,
                    .scale = static_cast<float>(options.scale),
                    .causal = options.causal,
                    .dtype = q.dtype,
                    .sinks_dtype = DType::f32};
  if (options.window) {
    check.require(options.causal, "window is given, but causal is false");
    check.require(*options.window >= 1, "window is ", *options.window,
                  ", expected at least 1 or None");
    p.window = *options.window;
  }
  if (options.sinks) {
    check.tensor("sinks", *options.sinks, {DType::f32, q.dtype}, {"H"});
    p.sinks = options.sinks->data;
    p.sinks_dtype = options.sinks->dtype;
  }
  if (options.prefix) {
    check.require(options.causal, "prefix is given, but causal is false");
    check.tensor("prefix", *options.prefix, {DType::i32}, {"B"});
    p.prefix = static_cast<const int32_t*>(options.prefix->data);
  }
  return p;
}

void check_cuda_rows(const Checker& check, const AttentionParams& p,
                     std::initializer_list<NamedTensor> tensors) {
  const int64_t elements = attention_alignment(p);
  const int64_t bytes = elements * static_cast<int64_t>(size_of(p.dtype));
  for (const auto& [name, t] : tensors) {
    bool aligned = reinterpret_cast<uintptr_t>(t->data) % bytes == 0;
    for (int i = 0; i + 1 < t->ndim; ++i) {
      aligned = aligned && (t->size(i) <= 1 || t->stride(i) % elements == 0);
    }
    check.require(aligned, name, " has an address or a stride that is no multiple of ", elements,
                  " elements, as CUDA expects it");
  }
}

const std::vector<AttentionItem>& attention_items(const AttentionParams& p, int64_t B, int64_t K) {
  // Blocks of all sizes of register tiles (kRows in attention_core.h) divide this; of matrix tiles
  // an item leaves a part of its last one empty.
  constexpr int64_t kUnit = 42;
  thread_local std::vector<AttentionItem> items;
  items.clear();
  int64_t longest = 0, total = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t rows = (p.cu_q[b + 1] - p.cu_q[b]) * p.group;
    longest = std::max(longest, rows);
    total += rows * K;
  }
  // Large blocks pack K and V less often; small ones give every thread several.
  int64_t most = attention_rows(p.D);
  while (most > 2 * kUnit && total < 4 * most * num_threads()) most -= kUnit;
  // Causal blocks at the end of a sequence see the most keys: they come first, so that no thread is
  // left with a long one at the end.
  const int64_t blocks = (longest + most - 1) / most;
  for (int64_t block = blocks - 1; block >= 0; --block) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t rows = (p.cu_q[b + 1] - p.cu_q[b]) * p.group;
      if (rows == 0) continue;
      const int64_t parts = (rows + most - 1) / most;
      const int64_t size =
          parts == 1 ? rows
                     : std::min(most, ((rows + parts - 1) / parts + kUnit - 1) / kUnit * kUnit);
      if (block * size >= rows) continue;
      for (int64_t k = 0; k < K; ++k) {
        items.push_back({.sequence = static_cast<int32_t>(b),
                         .kv_head = static_cast<int32_t>(k),
                         .first_row = block * size,
                         .end_row = std::min(rows, (block + 1) * size)});
      }
    }
  }
  return items;
}

}  // namespace ivr
