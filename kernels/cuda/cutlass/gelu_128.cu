#include "kernels/cuda/cutlass/gemm.cuh"

namespace ivr::cuda {

template cudaError_t launch_gemm<GemmEpilogue::gelu, 128>(const LinearParams&, int, cudaStream_t);

}  // namespace ivr::cuda
