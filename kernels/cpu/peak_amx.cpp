// peak on matrix tiles.
#include "kernels/cpu/amx.h"
#include "kernels/peak.h"

namespace ivr {
namespace IVR_ISA {

void peak_products_amx(int64_t rounds, int64_t& operations, float& sink) {
  Tiles t;
  t.zero<0>();
  t.zero<1>();
  t.zero<2>();
  t.zero<3>();
  alignas(64) float x[256];
  for (float& v : x) v = sink;
  t.load<4>(x, 64);
  t.load<5>(x, 64);
  t.load<6>(x, 64);
  t.load<7>(x, 64);
  for (int64_t n = 0; n < rounds; ++n) {
    t.multiply<0, 4, 6>();
    t.multiply<1, 4, 7>();
    t.multiply<2, 5, 6>();
    t.multiply<3, 5, 7>();
  }
  t.store<0>(x, 64);
  sink = x[0];
  operations = rounds * 4 * 16 * 16 * 32 * 2;
}

}  // namespace IVR_ISA
}  // namespace ivr
