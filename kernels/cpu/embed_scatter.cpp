#include "kernels/embed_scatter.h"

#include <string.h>

namespace ivr::IVR_ISA {

void embed_scatter(const EmbedScatterParams& p, int64_t begin, int64_t end) {
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  const char* table = static_cast<const char*>(p.table);
  const char* image = static_cast<const char*>(p.image);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = p.image_row ? p.image_row[t] : -1;
    const char* source =
        row >= 0 ? image + row * p.image_n * size : table + p.ids[t] * p.table_v * size;
    memcpy(static_cast<char*>(p.out) + t * p.out_t * size, source, static_cast<size_t>(p.C * size));
  }
}

}  // namespace ivr::IVR_ISA
