// flash_attention on the CPU: attention_core.h over keys and values at a fixed stride.
#include "kernels/flash_attention.h"

#include "kernels/cpu/attention_core.h"

namespace ivr {
namespace {

template <class T>
struct Rows {
  const T *k0, *v0;
  int64_t k_t, v_t;
  const T* k(int64_t j) const { return k0 + j * k_t; }
  const T* v(int64_t j) const { return v0 + j * v_t; }
};

template <class T>
void run(const FlashAttentionParams& p, const AttentionItem& item, float* scratch) {
  const int64_t b = item.sequence, first_kv = p.cu_kv[b];
  const Rows<T> rows = {static_cast<const T*>(p.k) + first_kv * p.k_t + item.kv_head * p.k_h,
                        static_cast<const T*>(p.v) + first_kv * p.v_t + item.kv_head * p.v_h, p.k_t,
                        p.v_t};
  Attention<T, Rows<T>>(p.a, item, rows, p.a.cu_q[b], p.a.cu_q[b + 1] - p.a.cu_q[b],
                        p.cu_kv[b + 1] - first_kv, scratch)
      .run();
}

}  // namespace

namespace IVR_ISA {

void flash_attention(const FlashAttentionParams& p, const AttentionItem* items, float* scratch,
                     int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if constexpr (kTakesF32) {
      if (p.a.dtype == DType::f32) {
        run<float>(p, items[i], scratch);
        continue;
      }
    }
    run<bf16>(p, items[i], scratch);
  }
}

}  // namespace IVR_ISA
}  // namespace ivr
