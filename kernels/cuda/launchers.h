// The CUDA face of every op, as the host sees it. Launchers run on the current device, on the
// stream given, asynchronously; they neither allocate nor synchronise, and may be captured in a
// graph. Shapes are trusted; what a kernel cannot index returns cudaErrorInvalidValue.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

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

namespace ivr::cuda {

cudaError_t embed_scatter(const EmbedScatterParams& params, cudaStream_t stream);
cudaError_t flash_attention(const FlashAttentionParams& params, cudaStream_t stream);
cudaError_t gated_activation(const GatedActivationParams& params, cudaStream_t stream);
cudaError_t grouped_linear(const GroupedLinearParams& params, cudaStream_t stream);
cudaError_t layer_norm(const LayerNormParams& params, cudaStream_t stream);
cudaError_t linear(const LinearParams& params, cudaStream_t stream);
cudaError_t moe_combine(const MoeCombineParams& params, cudaStream_t stream);
cudaError_t moe_route(const MoeRouteParams& params, cudaStream_t stream);
cudaError_t mxfp4_unpack(const Mxfp4Params& params, cudaStream_t stream);
cudaError_t paged_attention(const PagedAttentionParams& params, cudaStream_t stream);
cudaError_t pixel_unshuffle_norm(const PixelUnshuffleParams& params, cudaStream_t stream);
cudaError_t preprocess(const PreprocessParams& params, cudaStream_t stream);
cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream);
cudaError_t rope(const RopeParams& params, cudaStream_t stream);
cudaError_t sample(const SampleParams& params, cudaStream_t stream);

// What launchers choose their kernels for: 90 on a device of that compute capability where sm_90a
// code was built, else 80, which is mma.sync.
int capability();
// While on, every device counts as 80: to compare the variants of a kernel.
void force_mma(bool on);

// How often each variant of flash_attention was launched, in the order of AttentionVariant.
extern std::atomic<uint64_t> flash_attention_launches[kAttentionVariants];

// Floats of workspace for a decode step of this shape; 0: decode steps take none.
int64_t paged_attention_workspace(const PagedAttentionParams& params);

// Raises a kernel's limit of dynamic shared memory where it needs more than it may have at once:
// a property of the kernel, so that calling it under capture is allowed and changes nothing.
template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel* kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace ivr::cuda
