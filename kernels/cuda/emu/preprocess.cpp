#include "kernels/cuda/preprocess.cuh"

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {
namespace {

void allow_axis(Machine& machine, const ResampleAxis& axis) {
  machine.allow_read(axis.first, axis.n_out * 4, "first");
  machine.allow_read(axis.count, axis.n_out * 4, "count");
  machine.allow_read(axis.weights, axis.n_out * 2 * axis.taps * 2, "weights");
}

}  // namespace

bool run_preprocess(Machine& machine, const void* params, std::string& config) {
  const auto& p = *static_cast<const PreprocessParams*>(params);
  const int64_t size = static_cast<int64_t>(size_of(p.dtype));
  allow_rows(machine, Access::read, "image", p.image, p.H, 1, 3 * p.W, p.row_stride, 0);
  machine.allow_read(p.table, 3 * 256 * size, "table");
  for (int64_t i = 0; i < p.n_targets; ++i) {
    const PreprocessTarget& t = p.targets[i];
    allow_axis(machine, t.x);
    allow_axis(machine, t.y);
    machine.allow_read(t.mid, preprocess_mid_bytes(t), "mid");
    machine.allow_write(t.mid, preprocess_mid_bytes(t), "mid");
    machine.allow_write(t.out, 3 * t.x.n_out * t.y.n_out * size, "out");
  }
  bool clean = true;
  for (int64_t i = 0; i < 2 * p.n_targets && clean; ++i) {
    const PreprocessTarget& t = p.targets[i / 2];
    const cuda::PreprocessPass pass = cuda::preprocess_pass(p, t, i % 2 == 1);
    config += pass.along_y ? "y" : "x";
    config += pass.aligned ? "16 " : " ";
    const auto blocks = static_cast<unsigned>((pass.threads + cuda::kPreprocessThreads - 1) /
                                              cuda::kPreprocessThreads);
    cuda::with_preprocess_kernel(
        p.dtype, pass, [&]<typename T, bool kAlongY, bool kLast, bool kAligned>() {
          clean = machine.launch({blocks}, {cuda::kPreprocessThreads}, 0, [&] {
            cuda::preprocess_block<T, kAlongY, kLast, kAligned>(p, t, pass);
          });
        });
  }
  return clean;
}

}  // namespace ivr::emu
