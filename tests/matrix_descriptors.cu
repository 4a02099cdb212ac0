// Descriptors of the matrices of flash_attention_wgmma.cuh, by prim.cuh and by CUTLASS from the
// layout of the same tile. tests/test_gemm.py reads them from the PTX: each becomes an address, a
// constant.
#include <cutlass/bfloat16.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "kernels/cuda/flash_attention_wgmma.cuh"

namespace {

using namespace ivr::cuda;
namespace gmma = cute::SM90::GMMA;
using Element = cutlass::bfloat16_t;

constexpr int kEight = 8 * kWgmmaColumns * sizeof(bf16);
constexpr int kHalf = kWgmmaKeys * kWgmmaColumns * sizeof(bf16);

// The i-th block of 16 k of a tile [rows, kWgmmaKeys or kWgmmaColumns].
template <gmma::Major kMajor, int kRows, typename Layout>
__device__ uint64_t descriptor(const Layout& layout, int i) {
  IVR_DYNAMIC_SHARED(bf16, tile);
  const auto tensor =
      cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(tile)), layout);
  const auto block = cute::local_tile(tensor, cute::Shape<cute::Int<kRows>, cute::_16>{},
                                      cute::make_coord(cute::_0{}, i));
  return gmma::make_gmma_desc<kMajor>(block).desc_;
}

// Queries and keys: 64 columns, k along them.
template <int kRows>
__device__ uint64_t rows_descriptor(int i) {
  return descriptor<gmma::Major::K, kRows>(
      cute::tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{},
                          cute::Shape<cute::Int<kRows>, cute::Int<kWgmmaColumns>>{}),
      i);
}

// Values: k along the keys, halves of a head one behind the other.
template <int kD>
__device__ uint64_t values_descriptor(int i) {
  return descriptor<gmma::Major::MN, kD>(
      cute::tile_to_shape(gmma::Layout_MN_SW128_Atom<Element>{},
                          cute::Shape<cute::Int<kD>, cute::Int<kWgmmaKeys>>{},
                          cute::Step<cute::_2, cute::_1>{}),
      i);
}

}  // namespace

extern "C" __global__ void theirs(uint64_t* out) {
  out[0] = rows_descriptor<kWgmmaRows>(1);
  out[1] = rows_descriptor<kWgmmaKeys>(3);
  out[2] = values_descriptor<128>(2);
  out[3] = values_descriptor<128>(7);
}

extern "C" __global__ void ours(uint64_t* out) {
  IVR_DYNAMIC_SHARED(bf16, tile);
  out[0] = matrix_descriptor(tile + 1 * 16, 16, kEight);
  out[1] = matrix_descriptor(tile + 3 * 16, 16, kEight);
  out[2] = matrix_descriptor(tile + 2 * 16 * kWgmmaColumns, kHalf, kEight);
  out[3] = matrix_descriptor(tile + 7 * 16 * kWgmmaColumns, kHalf, kEight);
}
