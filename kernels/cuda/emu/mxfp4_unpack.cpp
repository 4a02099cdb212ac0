#include "kernels/cuda/mxfp4_unpack.cuh"

#include "kernels/cuda/emu/rows.h"

namespace ivr::emu {

bool run_mxfp4_unpack(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const Mxfp4Params*>(params);
  if (p.B == 0) {
    config = "empty";
    return true;
  }
  machine.allow_read(p.blocks, p.B * kMxfp4Block / 2, "blocks");
  machine.allow_read(p.scales, p.B, "scales");
  machine.allow_write(p.out, p.B * kMxfp4Block * 2, "out");

  const cuda::Mxfp4Config c = cuda::mxfp4_unpack_config(p);
  config = words(c);
  bool clean = false;
  cuda::with_mxfp4_kernel(c, [&]<bool kAligned>() {
    clean = machine.launch({static_cast<unsigned>(c.blocks)}, {cuda::kMxfp4Threads}, 0,
                           [&p] { cuda::mxfp4_unpack_block<kAligned>(p); });
  });
  return clean;
}

}  // namespace ivr::emu
