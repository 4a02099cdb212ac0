// The CUDA face of every op, as the host sees it. Launchers run on the current device, on the
// stream given, asynchronously; they neither allocate nor synchronise, and may be captured in a
// graph. Shapes are trusted; what a kernel cannot index returns cudaErrorInvalidValue.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/embed_scatter.h"
#include "kernels/gated_activation.h"
#include "kernels/layer_norm.h"
#include "kernels/pixel_unshuffle_mlp.h"
#include "kernels/preprocess.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"

namespace ivr::cuda {

cudaError_t embed_scatter(const EmbedScatterParams& params, cudaStream_t stream);
cudaError_t gated_activation(const GatedActivationParams& params, cudaStream_t stream);
cudaError_t layer_norm(const LayerNormParams& params, cudaStream_t stream);
cudaError_t pixel_unshuffle_norm(const PixelUnshuffleParams& params, cudaStream_t stream);
cudaError_t preprocess(const PreprocessParams& params, cudaStream_t stream);
cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream);
cudaError_t rope(const RopeParams& params, cudaStream_t stream);
cudaError_t sample(const SampleParams& params, cudaStream_t stream);

}  // namespace ivr::cuda
