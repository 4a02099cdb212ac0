// paged_attention on the CPU: attention_core.h over keys and values in pages.
#include "kernels/paged_attention.h"

#include "kernels/cpu/attention_core.h"

namespace ivr {
namespace {

template <class T>
struct Pages {
  const T *k0, *v0;
  const int32_t* table;
  int64_t k_page, k_p, v_page, v_p;
  int shift;
  const T* k(int64_t j) const {
    return k0 + table[j >> shift] * k_page + (j & ((int64_t{1} << shift) - 1)) * k_p;
  }
  const T* v(int64_t j) const {
    return v0 + table[j >> shift] * v_page + (j & ((int64_t{1} << shift) - 1)) * v_p;
  }
};

template <class T>
void run(const PagedAttentionParams& p, const AttentionItem& item, float* scratch) {
  const int64_t b = item.sequence;
  const Pages<T> pages = {static_cast<const T*>(p.k_cache) + item.kv_head * p.k_h,
                          static_cast<const T*>(p.v_cache) + item.kv_head * p.v_h,
                          p.page_table + b * p.page_table_b,
                          p.k_page,
                          p.k_p,
                          p.v_page,
                          p.v_p,
                          p.page_shift};
  Attention<T, Pages<T>>(p.a, item, pages, p.a.cu_q[b], p.a.cu_q[b + 1] - p.a.cu_q[b], p.kv_lens[b],
                         scratch)
      .run();
}

}  // namespace

namespace IVR_ISA {

void paged_attention(const PagedAttentionParams& p, const AttentionItem* items, float* scratch,
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
