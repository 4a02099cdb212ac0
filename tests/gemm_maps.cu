// What the matrix products of Hopper ask of the copy engine and where their sums lie, printed for
// tests/test_gemm.py: the driver's entry point is ours and writes down what it is given.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL

#include <cuda.h>

#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/cutlass/gemm.cuh"

CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  std::printf("map %zu %d %d %d", reinterpret_cast<size_t>(address), static_cast<int>(type),
              static_cast<int>(swizzle), static_cast<int>(fill));
  for (cuuint32_t i = 0; i < rank; ++i) {
    std::printf(" %zu,%zu,%u,%u", static_cast<size_t>(sizes[i]),
                i == 0 ? size_t{2} : static_cast<size_t>(strides[i - 1]), box[i], steps[i]);
  }
  std::printf("\n");
  return CUDA_SUCCESS;
}

namespace {

using namespace ivr;
using namespace ivr::cuda;

template <GemmEpilogue kEpilogue, int kN>
void print(const LinearParams& p, int multiprocessors) {
  using G = Gemm<kEpilogue, kN>;
  using Kernel = typename G::Kernel;
  char name[64];
  format(GemmConfig{kEpilogue, kN}, name, sizeof(name));
  std::printf("kernel %s\n", name);
  const auto params = Kernel::to_underlying_arguments(G::arguments(p, multiprocessors), nullptr);
  const dim3 grid = Kernel::get_grid_shape(params), block = Kernel::get_block_shape();
  std::printf("launch %u %u %u %u %d %d\n", grid.x, grid.y, grid.z, block.x,
              Kernel::SharedStorageSize, static_cast<int>(G::Loop::DispatchPolicy::Stages));
  std::printf("workspace %zu\n", Kernel::get_workspace_size(G::arguments(p, multiprocessors)));
  const typename Kernel::TiledMma mma;
  const auto tile = cute::make_identity_tensor(cute::make_shape(kGemmM, kN));
  int wrong = 0;
  for (int thread = 0; thread < gemm_threads(kN); ++thread) {
    const auto sums = mma.get_slice(thread).partition_C(tile);
    for (int i = 0; i < static_cast<int>(cute::size(sums)); ++i) {
      wrong += static_cast<int>(cute::get<0>(sums(i))) != gemm_row(kN, thread, i) ||
               static_cast<int>(cute::get<1>(sums(i))) != gemm_column(kN, thread, i);
    }
  }
  std::printf("sums %d %d\n", static_cast<int>(cute::size(mma)), wrong);
}

}  // namespace

int main(int, char** arguments) {
  LinearParams p{};
  p.x = reinterpret_cast<const void*>(size_t{1} << 20);
  p.weight = reinterpret_cast<const void*>(size_t{2} << 20);
  p.M = std::atoll(arguments[1]);
  p.N = std::atoll(arguments[2]);
  p.K = std::atoll(arguments[3]);
  p.x_m = std::atoll(arguments[4]);
  const int multiprocessors = std::atoi(arguments[5]);
  print<GemmEpilogue::bias, kGemmNarrow>(p, multiprocessors);
  print<GemmEpilogue::residual, kGemmWide>(p, multiprocessors);
  print<GemmEpilogue::swiglu, kGemmWide>(p, multiprocessors);
}
