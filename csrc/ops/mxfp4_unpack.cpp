#include "kernels/mxfp4_unpack.h"

#include "csrc/bind.h"
#include "csrc/cuda.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(kernel, "mxfp4_unpack", mxfp4_unpack);

constexpr int64_t kGrainBlocks = 1024;

void mxfp4_unpack(Tensor blocks, Tensor scales, Tensor out) {
  Checker check("mxfp4_unpack");
  check.tensor("blocks", blocks, {DType::u8}, {"B", "16"});
  check.tensor("scales", scales, {DType::u8}, {"B"});
  check.tensor("out", out, {DType::bf16}, {"B", "32"});
  check.require(blocks.contiguous() && out.contiguous(), "blocks and out must be contiguous");
  const Mxfp4Params p{.blocks = static_cast<const uint8_t*>(blocks.data),
                      .scales = static_cast<const uint8_t*>(scales.data),
                      .out = out.data,
                      .B = check["B"]};
  if (p.B == 0 || ran_on_cuda(check, IVR_CUDA_KERNEL(mxfp4_unpack), p, blocks)) return;
  const auto run = kernel.pick();
  parallel_for(p.B, kGrainBlocks, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

IVR_BIND(mxfp4_unpack) {
  m.def("mxfp4_unpack", &mxfp4_unpack, ReleaseGil(), py::arg("blocks"), py::arg("scales"),
        py::arg("out"));
}

}  // namespace ivr
