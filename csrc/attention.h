// Checks and work division that flash_attention and paged_attention share.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "csrc/check.h"
#include "csrc/tensor.h"
#include "kernels/attention.h"

namespace ivr {

struct AttentionOptions {
  double scale;
  bool causal;
  std::optional<int64_t> window;
  const std::optional<Tensor>& sinks;
  const std::optional<Tensor>& prefix;
};

// Checks out, cu_q and the options and binds B; q, k and v (T, H, K, D) have been checked already.
AttentionParams attention_params(Checker& check, const Tensor& q, const Tensor& out,
                                 const Tensor& cu_q, const AttentionOptions& options);

// 0 <= prefix[b] <= kv_len(b). On the CPU only.
template <class KvLen>
void check_prefix(const Checker& check, const AttentionParams& p, int64_t B, KvLen&& kv_len) {
  for (int64_t b = 0; p.prefix && b < B; ++b) {
    if (p.prefix[b] >= 0 && p.prefix[b] <= kv_len(b)) continue;
    check.fail("prefix[" + std::to_string(b) + "] is " + std::to_string(p.prefix[b]) +
               ", allowed: 0 to the sequence's " + std::to_string(kv_len(b)) + " keys");
  }
}

// On CUDA rows are fetched in vectors: addresses and strides are multiples of them.
struct NamedTensor {
  const char* name;
  const Tensor* tensor;
};
void check_cuda_rows(const Checker& check, const AttentionParams& p,
                     std::initializer_list<NamedTensor> tensors);

// The items of a call, the longest first. The list belongs to the calling thread and is valid until
// its next call.
const std::vector<AttentionItem>& attention_items(const AttentionParams& p, int64_t B, int64_t K);

}  // namespace ivr
