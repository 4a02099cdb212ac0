// linear on Hopper, many rows: CUTLASS's warp-specialised main loop (copy engine, wgmma) under our
// epilogue. One unit a kernel: each takes half a minute and 4 GB to compile.
//
// Tiles      128x128 by two groups of warps in turns, so that one multiplies while the other
//            finishes; 128x256 by both together, which asks less of the L2 cache. 64 k a stage.
// Clusters   two blocks with the same rows fetch x once. Not the same columns: tiles of 1025 rows a
//            picture, and a prefill of 1088, make an odd number of row tiles, and the one too many
//            costs a whole round of blocks.
// Blocks     persistent, one a multiprocessor; tiles go to them in a fixed order, each whole.
// SwiGLU     the weight stays gate over up: its tensor map reads 8 rows of gate, 8 of up in turns,
//            so that a thread holds both of a column.
#pragma once

#include <cutlass/device_kernel.h>

#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "kernels/cuda/gemm_launchers.h"
#include "kernels/cuda/gemm_store.cuh"
#include "kernels/cuda/launchers.h"

namespace ivr::cuda {

// In the form that CUTLASS asks of an epilogue which needs neither copies nor shared memory.
template <GemmEpilogue kEpilogue>
struct GemmStore {
  using ElementC = cutlass::bfloat16_t;
  using ElementD = cutlass::bfloat16_t;
  using ElementAccumulator = float;
  using StrideC = cute::Stride<int64_t, cute::_1, cute::_0>;
  using StrideD = StrideC;
  struct SharedStorage {};
  using Arguments = LinearParams;
  using Params = LinearParams;

  template <typename Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& p, void*) {
    return p;
  }
  template <typename Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }

  const Params& params;

  CUTLASS_DEVICE explicit GemmStore(const Params& p) : params(p) {}

  template <typename Problem, typename Tile, typename Coord, typename Sums, typename Mma,
            typename Residue>
  CUTLASS_DEVICE void operator()(const Problem&, const Tile&, const Coord& coord, const Sums& sums,
                                 Mma, const Residue&, int thread, char*) {
    constexpr int kN = cute::size<1>(Tile{});
    static_assert(cute::size(Mma{}) == gemm_threads(kN));
    static_assert(cute::size(Sums{}) * gemm_threads(kN) == kGemmM * kN);
    // Where the columns have several modes, tiles follow one another along the last.
    const auto columns = cute::flatten(cute::make_tuple(cute::get<1>(coord)));
    store_tile<kEpilogue, kN>(params, kGemmM * cute::get<0>(coord), kN * cute::back(columns),
                              thread, [&](int i) { return sums(i); });
  }
};

template <GemmEpilogue kEpilogue, int kN>
struct Gemm {
  static constexpr bool kGated = kEpilogue == GemmEpilogue::swiglu;
  static constexpr bool kTurns = kN == kGemmNarrow;
  using Element = cutlass::bfloat16_t;
  using StrideX = cute::Stride<int64_t, cute::_1, int64_t>;
  // Rows of the weight: 8 neighbours, gate or up, and the next 8 of both.
  using StrideW = std::conditional_t<
      kGated, cute::Stride<cute::Stride<int64_t, int64_t, int64_t>, cute::_1, int64_t>, StrideX>;
  using TileN = std::conditional_t<kGated, cute::Shape<cute::_8, cute::_2, cute::Int<kN / 16>>,
                                   cute::Int<kN>>;
  using ProblemN = std::conditional_t<kGated, cute::Shape<int, int, int>, int>;
  using Tile = cute::Shape<cute::Int<kGemmM>, TileN, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
  using Schedule = std::conditional_t<kTurns, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                      cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Store =
      cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<GemmStore<kEpilogue>>;
  using Loop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, StrideX, 8, Element, StrideW, 8,
      float, Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<1024>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, ProblemN, int, int>, Loop,
                                                      Store, cutlass::gemm::PersistentScheduler>;

  static typename Kernel::Arguments arguments(const LinearParams& p, int multiprocessors) {
    const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), K = static_cast<int>(p.K);
    const StrideX x{gemm_stride(p.M, p.x_m, p.K), {}, 0};
    StrideW w;
    ProblemN n;
    if constexpr (kGated) {
      w = {{p.K, p.N / 2 * p.K, 8 * p.K}, {}, 0};
      n = {8, 2, N / 16};
    } else {
      w = {p.K, {}, 0};
      n = N;
    }
    LinearParams store = p;
    store.out_m = gemm_stride(p.M, p.out_m, 0);
    store.residual_m = gemm_stride(p.M, p.residual_m, 0);
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {M, n, K, 1},
            {static_cast<const Element*>(p.x), x, static_cast<const Element*>(p.weight), w},
            store,
            {0, multiprocessors}};
  }
};

template <GemmEpilogue kEpilogue, int kN>
cudaError_t launch_gemm(const LinearParams& p, int multiprocessors, cudaStream_t stream) {
  using Kernel = typename Gemm<kEpilogue, kN>::Kernel;
  auto params =
      Kernel::to_underlying_arguments(Gemm<kEpilogue, kN>::arguments(p, multiprocessors), nullptr);
  const auto kernel = cutlass::device_kernel<Kernel>;
  const cudaError_t error = allow_shared_bytes(kernel, Kernel::SharedStorageSize);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, 2, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace ivr::cuda
