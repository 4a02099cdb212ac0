#include "kernels/cuda/cutlass/gemm.cuh"

namespace ivr::cuda {

template cudaError_t launch_gemm<GemmEpilogue::bias, 256>(const LinearParams&, int, cudaStream_t);

}  // namespace ivr::cuda
