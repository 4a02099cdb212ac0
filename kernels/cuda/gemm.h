// The matrix products of Hopper (kernels/cuda/cutlass): which of them takes a call of linear.
//
// A pure function of the call's description: a weight's shape and its epilogue name the kernel and
// its tile, and the number of rows never does. Every tile adds the k of an element in ascending
// order in blocks of 16, from zero, in one accumulator.
//
// What no kernel takes stays with kernels/cuda/linear.cuh: decode, float32 and float32 results,
// activations without a kernel, and operands that the copy engine cannot address, which wants rows
// and strides in multiples of 16 bytes.
#pragma once

#include <cstdio>
#include <iterator>
#include <limits>
#include <optional>

#include "kernels/linear.h"

namespace ivr::cuda {

enum class GemmEpilogue : int32_t {
  bias,      // x W^T + bias
  gelu,      // gelu(x W^T + bias)
  residual,  // residual + scale * (x W^T + bias)
  swiglu,    // silu(x G^T + bias) * (x U^T + bias), where the weight is G over U
};
// bias and scale may be null wherever they are named.

struct GemmConfig {
  GemmEpilogue epilogue;
  int n;  // columns of a tile, of kGemmM rows; of gate and up together
};

constexpr int kGemmM = 128;
constexpr int kGemmNarrow = 128, kGemmWide = 256;
// From here on a weight has columns enough for wide tiles on every multiprocessor.
constexpr int64_t kGemmWideN = 3072;

// Every kernel there is.
constexpr GemmConfig kGemms[] = {
    {GemmEpilogue::bias, kGemmNarrow},   {GemmEpilogue::bias, kGemmWide},
    {GemmEpilogue::gelu, kGemmNarrow},   {GemmEpilogue::residual, kGemmNarrow},
    {GemmEpilogue::residual, kGemmWide}, {GemmEpilogue::swiglu, kGemmWide},
};

// Threads that multiply a tile together.
constexpr int gemm_threads(int n) { return n == kGemmNarrow ? 128 : 256; }

// Where a thread's i-th sum stands in a tile, as wgmma leaves them: two columns of two rows, 8
// apart, of every block of 8 columns; then the same 64 rows below.
constexpr int gemm_row(int n, int thread, int i) {
  const int step = i / (n / 2), half = i / 2 % 2;
  return (step * gemm_threads(n) + thread) / 32 * 16 + half * 8 + thread % 32 / 4;
}
constexpr int gemm_column(int n, int thread, int i) {
  return i / 4 % (n / 8) * 8 + thread % 4 * 2 + i % 2;
}

// The row of the weight behind a column of the product: gate and up take turns, 8 rows at a time.
constexpr int64_t gemm_weight_row(const GemmConfig& c, int64_t N, int64_t n) {
  if (c.epilogue != GemmEpilogue::swiglu) return n;
  return n / 16 * 8 + n / 8 % 2 * (N / 2) + n % 8;
}

constexpr size_t gemm_index(const GemmConfig& c) {
  size_t i = 0;
  while (kGemms[i].epilogue != c.epilogue || kGemms[i].n != c.n) ++i;
  return i;
}

// The stride of rows that a kernel may use: torch gives a single row any stride.
constexpr int64_t gemm_stride(int64_t rows, int64_t stride, int64_t width) {
  return rows > 1 ? stride : width;
}

inline bool gemm_addressable(const LinearParams& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  const auto at = [](const void* base, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(base) % bytes == 0;
  };
  const int64_t width = p.activation == Activation::swiglu ? p.N / 2 : p.N;
  const auto rows = [&](const void* base, int64_t stride, int64_t columns) {
    const int64_t row = gemm_stride(p.M, stride, columns);
    return at(base, 16) && row % 8 == 0 && row >= columns && row <= kMax;
  };
  return p.K > 0 && p.K % 8 == 0 && width % 8 == 0 && p.M <= kMax && p.N <= kMax && p.K <= kMax &&
         rows(p.x, p.x_m, p.K) && at(p.weight, 16) && rows(p.out, p.out_m, width) &&
         (p.residual == nullptr || rows(p.residual, p.residual_m, width)) && at(p.bias, 4) &&
         at(p.scale, 4);
}

// For M, N > 0. A SwiGLU has N columns of weight, an even number, and N / 2 of out.
inline std::optional<GemmConfig> gemm_config(const LinearParams& p) {
  const bool bf16 =
      p.dtype == DType::bf16 && p.out_dtype == DType::bf16 && p.format == WeightFormat::bf16;
  if (p.decode || !bf16 || !gemm_addressable(p)) return std::nullopt;
  const bool plain = p.residual == nullptr && p.scale == nullptr;
  const int n = p.N >= kGemmWideN ? kGemmWide : kGemmNarrow;
  switch (p.activation) {
    case Activation::none:
      if (plain) return GemmConfig{GemmEpilogue::bias, n};
      if (p.residual == nullptr) return std::nullopt;
      return GemmConfig{GemmEpilogue::residual, n};
    case Activation::gelu:
      // Its epilogue costs half of a product over 1024 k: narrow tiles do it beside the next one.
      if (plain) return GemmConfig{GemmEpilogue::gelu, kGemmNarrow};
      return std::nullopt;
    case Activation::swiglu:
      if (plain) return GemmConfig{GemmEpilogue::swiglu, kGemmWide};
      return std::nullopt;
    default:
      return std::nullopt;
  }
}

// `gemm_gelu_128x128`; returns what snprintf returns.
inline int format(const GemmConfig& c, char* out, size_t size) {
  constexpr const char* kNames[] = {"bias", "gelu", "residual", "swiglu"};
  return std::snprintf(out, size, "gemm_%s_%dx%d", kNames[static_cast<int>(c.epilogue)], kGemmM,
                       c.n);
}

}  // namespace ivr::cuda
