#include "kernels/cuda/embed_scatter.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_embed_scatter(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const EmbedScatterParams*>(params);
  if (p.T == 0 || p.C == 0) {
    config = "empty";
    return true;
  }
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const auto rows = [&](Access access, const char* name, const void* base, int64_t n, int64_t row) {
    allow_rows(machine, access, name, base, n, 1, p.C * size, row * size, 0);
  };
  rows(Access::read, "table", p.table, p.V, p.table_v);
  rows(Access::read, "image", p.image, p.N, p.image_n);
  rows(Access::write, "out", p.out, p.T, p.out_t);
  machine.allow_read(p.ids, p.T * 8, "ids");
  if (p.image_row != nullptr) machine.allow_read(p.image_row, p.T * 8, "image_row");

  const cuda::ChunkConfig c = cuda::embed_scatter_config(p);
  bool clean = false;
  cuda::with_element(p.dtype, c.aligned, [&]<typename T, bool kAligned>() {
    clean = launch_chunks(machine, c, config,
                          [&] { cuda::embed_scatter_block<T, kAligned>(p, c.chunks); });
  });
  return clean;
}

}  // namespace ivr::emu
