#include "kernels/cuda/emu/ops.h"
#include "kernels/cuda/gemm_store.cuh"

namespace ivr::emu {
namespace {

using cuda::GemmConfig;
using cuda::GemmEpilogue;

// The matrix products of Hopper with their main loop replaced by what it is for: the sums of a tile
// where wgmma would leave them. The epilogue and the choice of the kernel are those of the device.
template <GemmEpilogue kEpilogue, int kN>
void gemm_block(const LinearParams& p) {
  constexpr int kSums = cuda::kGemmM * kN / cuda::gemm_threads(kN);
  const int thread = threadIdx.x;
  const int m0 = blockIdx.y * cuda::kGemmM, n0 = blockIdx.x * kN;
  float sums[kSums];
  for (int i = 0; i < kSums; ++i) {
    const int m = m0 + cuda::gemm_row(kN, thread, i), n = n0 + cuda::gemm_column(kN, thread, i);
    sums[i] = 0.0f;
    if (m >= p.M || n >= p.N) continue;  // the copy engine fills in zeros
    const int64_t row = cuda::gemm_weight_row({kEpilogue, kN}, p.N, n);
    for (int k = 0; k < p.K; ++k) {
      sums[i] += cuda::load_float(p.x, m * p.x_m + k, false) *
                 cuda::load_float(p.weight, row * p.K + k, false);
    }
  }
  cuda::store_tile<kEpilogue, kN>(p, m0, n0, thread, [&](int i) { return sums[i]; });
}

template <size_t kIndex>
bool run(Machine& machine, const LinearParams& p) {
  static constexpr GemmConfig c = cuda::kGemms[kIndex];
  const auto blocks = [](int64_t size, int64_t step) {
    return static_cast<unsigned>((size + step - 1) / step);
  };
  return machine.launch({blocks(p.N, c.n), blocks(p.M, cuda::kGemmM)},
                        {static_cast<unsigned>(cuda::gemm_threads(c.n))}, 0,
                        [&p] { gemm_block<c.epilogue, c.n>(p); });
}

template <size_t... kIndex>
bool run_one(size_t index, Machine& machine, const LinearParams& p,
             std::index_sequence<kIndex...>) {
  bool clean = false;
  ((index == kIndex ? void(clean = run<kIndex>(machine, p)) : void()), ...);
  return clean;
}

}  // namespace

bool run_gemm(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const LinearParams*>(params);
  const auto c = p.M * p.N > 0 ? cuda::gemm_config(p) : std::nullopt;
  if (!c) {
    config = "none";
    return true;
  }
  char text[128];
  cuda::format(*c, text, sizeof(text));
  config = text;
  const int64_t width = p.activation == Activation::swiglu ? p.N / 2 : p.N;
  const auto rows = [&](Access access, const char* name, const void* base, int64_t count,
                        int64_t columns, int64_t stride) {
    allow_rows(machine, access, name, base, count, 1, columns * 2, stride * 2, 0);
  };
  rows(Access::read, "x", p.x, p.M, p.K, p.x_m);
  rows(Access::read, "weight", p.weight, p.N, p.K, p.K);
  rows(Access::read, "bias", p.bias, 1, p.N, 0);
  rows(Access::read, "scale", p.scale, 1, p.N, 0);
  rows(Access::read, "residual", p.residual, p.M, width, p.residual_m);
  rows(Access::write, "out", p.out, p.M, width, p.out_m);
  return run_one(cuda::gemm_index(*c), machine, p,
                 std::make_index_sequence<std::size(cuda::kGemms)>());
}

}  // namespace ivr::emu
