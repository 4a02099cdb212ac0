// The emulator as a shared library: ops by name, params structs by pointer.
#include "kernels/cuda/emu/ops.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>

#include "kernels/cuda/emu/planted.h"
#include "kernels/cuda/gemm.h"
#include "kernels/embed_scatter.h"
#include "kernels/flash_attention.h"
#include "kernels/gated_activation.h"
#include "kernels/grouped_linear.h"
#include "kernels/layer_norm.h"
#include "kernels/linear.h"
#include "kernels/moe_combine.h"
#include "kernels/moe_route.h"
#include "kernels/mxfp4_unpack.h"
#include "kernels/paged_attention.h"
#include "kernels/pixel_unshuffle_mlp.h"
#include "kernels/preprocess.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"

namespace ivr::emu {

void allow_rows(Machine& machine, Access access, const char* name, const void* base, int64_t rows,
                int64_t heads, int64_t bytes, int64_t row_stride, int64_t head_stride) {
  if (base == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      const char* begin = static_cast<const char*>(base) + r * row_stride + h * head_stride;
      access == Access::read ? machine.allow_read(begin, bytes, name, r * heads + h)
                             : machine.allow_write(begin, bytes, name, r * heads + h);
    }
  }
}

namespace {

constexpr Op kOps[] = {
    {"embed_scatter", sizeof(EmbedScatterParams), run_embed_scatter},
    {"flash_attention", sizeof(FlashAttentionParams), run_flash_attention},
    {"gated_activation", sizeof(GatedActivationParams), run_gated_activation},
    {"gemm", sizeof(LinearParams), run_gemm},
    {"grouped_linear", sizeof(GroupedLinearParams), run_grouped_linear},
    {"layer_norm", sizeof(LayerNormParams), run_layer_norm},
    {"linear", sizeof(LinearParams), run_linear},
    {"moe_combine", sizeof(MoeCombineParams), run_moe_combine},
    {"moe_route", sizeof(MoeRouteParams), run_moe_route},
    {"mxfp4_unpack", sizeof(Mxfp4Params), run_mxfp4_unpack},
    {"paged_attention", sizeof(PagedAttentionParams), run_paged_attention},
    {"pixel_unshuffle_mlp", sizeof(PixelUnshuffleParams), run_pixel_unshuffle_norm},
    {"preprocess", sizeof(PreprocessParams), run_preprocess},
    {"rms_norm", sizeof(RmsNormParams), run_rms_norm},
    {"rope", sizeof(RopeParams), run_rope},
    {"sample", sizeof(SampleParams), run_sample},
};

const Op* find(const char* name) {
  const auto named = [name](const Op& op) { return std::strcmp(op.name, name) == 0; };
  const auto op = std::find_if(std::begin(kOps), std::end(kOps), named);
  if (op != std::end(kOps)) return op;
  const auto planted = std::find_if(std::begin(kPlanted), std::end(kPlanted), named);
  return planted != std::end(kPlanted) ? planted : nullptr;
}

}  // namespace
}  // namespace ivr::emu

extern "C" {

// The i-th op's name; null behind the last.
const char* ivr_emu_op(size_t i) {
  return i < std::size(ivr::emu::kOps) ? ivr::emu::kOps[i].name : nullptr;
}

// sizeof the op's params struct, so that a caller's copy of it can be checked; 0: no such op.
size_t ivr_emu_params_size(const char* name) {
  const ivr::emu::Op* op = ivr::emu::find(name);
  return op != nullptr ? op->params_size : 0;
}

// The matrix product of Hopper for a call of linear, which is not run: addresses may be made up.
void ivr_emu_gemm_config(const void* params, char* name, size_t size) {
  const auto c = ivr::cuda::gemm_config(*static_cast<const ivr::LinearParams*>(params));
  c ? ivr::cuda::format(*c, name, size) : std::snprintf(name, size, "none");
}

// As on a device of this compute capability, 80 or 90. 0: ran clean, `report` holds the launch
// configuration. 1: `report` holds the finding. 2: no such op.
int ivr_emu_run(const char* name, const void* params, int capability, uint64_t seed, char* report,
                size_t size) {
  const ivr::emu::Op* op = ivr::emu::find(name);
  if (op == nullptr) return 2;
  ivr::emu::Machine machine(seed, capability);
  std::string config;
  const bool clean = op->run(machine, params, config);
  std::snprintf(report, size, "%s", (clean ? config : machine.report()).c_str());
  return clean ? 0 : 1;
}
}
