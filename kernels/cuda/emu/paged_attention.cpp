#include "kernels/cuda/paged_attention.cuh"

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {
namespace {

void allow_cache(Machine& machine, const char* name, const void* base,
                 const PagedAttentionParams& p, int64_t page_stride, int64_t head_stride,
                 int64_t row_stride) {
  const int64_t size = static_cast<int64_t>(size_of(p.a.dtype));
  for (int64_t page = 0; page < p.pages; ++page) {
    const char* begin = static_cast<const char*>(base) + page * page_stride * size;
    allow_rows(machine, Access::read, name, begin, int64_t{1} << p.page_shift, p.a.K, p.a.D * size,
               row_stride * size, head_stride * size);
  }
}

template <int kD>
bool decode(Machine& machine, const PagedAttentionParams& p, const cuda::PagedAttentionConfig& c,
            Dim3 grid) {
  const Dim3 splits{grid.x, grid.y, c.splits};
  const bool clean = machine.launch(splits, {cuda::kAttentionThreads}, c.shared_bytes,
                                    [&p] { cuda::split_attention_block<kD>(p); });
  if (!clean || c.splits == 1) return clean;
  const int count = static_cast<int>(c.splits);
  return machine.launch(grid, {cuda::kAttentionThreads}, 0,
                        [&p, count] { cuda::merge_attention_block<kD>(p, count); });
}

}  // namespace

bool run_paged_attention(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const PagedAttentionParams*>(params);
  if (p.a.T == 0 || p.a.K == 0) {
    config = "empty";
    return true;
  }
  allow_attention(machine, p.a);
  allow_cache(machine, "k_cache", p.k_cache, p, p.k_page, p.k_h, p.k_p);
  allow_cache(machine, "v_cache", p.v_cache, p, p.v_page, p.v_h, p.v_p);
  allow_rows(machine, Access::read, "page_table", p.page_table, p.a.B, 1, p.max_pages * 4,
             p.page_table_b * 4, 0);
  machine.allow_read(p.kv_lens, p.a.B * 4, "kv_lens");
  const int64_t floats = cuda::paged_attention_workspace(p.a, p.max_pages << p.page_shift);
  machine.allow_read(p.workspace, p.workspace != nullptr ? floats * 4 : 0, "workspace");
  machine.allow_write(p.workspace, p.workspace != nullptr ? floats * 4 : 0, "workspace");

  const cuda::PagedAttentionConfig c = cuda::paged_attention_config(p);
  char text[128];
  cuda::format(c, text, sizeof(text));
  config = text;
  const Dim3 grid{c.blocks, static_cast<unsigned>(p.a.K)};
  bool clean = false;
  cuda::with_paged_attention_kernel(p.a.dtype, c, [&]<typename T, int kD>() {
    if constexpr (kD != 0) {
      if (c.splits > 0) {
        clean = decode<kD>(machine, p, c, grid);
        return;
      }
    }
    clean = machine.launch(grid, {cuda::kAttentionThreads}, c.shared_bytes,
                           [&p] { cuda::paged_attention_block<T, kD>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
