#include "kernels/preprocess.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "csrc/bind.h"

namespace ivr {
namespace {

IVR_CPU_KERNEL_OBJECT(first_stage, "preprocess_first", preprocess_first);
IVR_CPU_KERNEL_OBJECT(second_stage, "preprocess_second", preprocess_second);

// Above this a coordinate is not exact in single precision, in which Pillow takes the source's box.
constexpr int64_t kMaxSide = 1 << 24;

// Keys' cubic convolution (1981) with a = -1/2.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// The weights of one axis. The order of the double precision operations is Pillow's, so that every
// weight rounds to the same fixed-point number.
struct AxisTable {
  std::vector<int32_t> first, count;
  std::vector<int16_t> weights;
  ResampleAxis axis{};

  AxisTable(int64_t n_in, int64_t n_out) {
    const double scale = static_cast<double>(n_in) / static_cast<double>(n_out);
    const double stretch = scale < 1.0 ? 1.0 : scale;  // shrinking widens the filter
    const double support = 2.0 * stretch;
    const double inverse = 1.0 / stretch;
    const int64_t taps = (static_cast<int64_t>(std::ceil(support)) * 2 + 2) / 2 * 2;
    first.resize(n_out);
    count.resize(n_out);
    weights.assign(n_out * 2 * taps, 0);
    std::vector<double> w(taps);
    std::vector<int32_t> fixed(taps);
    for (int64_t o = 0; o < n_out; ++o) {
      const double center = (static_cast<double>(o) + 0.5) * scale;
      int64_t begin = static_cast<int64_t>(center - support + 0.5);
      int64_t end = static_cast<int64_t>(center + support + 0.5);
      if (begin < 0) begin = 0;
      if (end > n_in) end = n_in;
      const int64_t n = end - begin;
      double total = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        w[i] = bicubic((static_cast<double>(i + begin) - center + 0.5) * inverse);
        total += w[i];
      }
      for (int64_t i = 0; i < n; ++i) {
        const double exact = (total != 0.0 ? w[i] / total : w[i]) * (1 << kResampleBits);
        fixed[i] = static_cast<int32_t>(exact < 0 ? exact - 0.5 : exact + 0.5);
      }
      // Taps that round to nothing cost time and change no sum.
      int64_t from = 0, to = n;
      while (to - from > 1 && fixed[from] == 0) ++from;
      while (to - from > 1 && fixed[to - 1] == 0) --to;
      first[o] = static_cast<int32_t>(begin + from);
      count[o] = static_cast<int32_t>(to - from);
      int16_t* hi = &weights[o * 2 * taps];
      int16_t* lo = hi + taps;
      for (int64_t i = from; i < to; ++i) {
        constexpr int32_t half = 1 << (kResampleDigitBits - 1);
        const int32_t high = (fixed[i] + half) >> kResampleDigitBits;
        hi[i - from] = static_cast<int16_t>(high);
        lo[i - from] = static_cast<int16_t>(fixed[i] - high * (1 << kResampleDigitBits));
      }
    }
    axis = {.n_in = n_in,
            .n_out = n_out,
            .taps = taps,
            .first = first.data(),
            .count = count.data(),
            .weights = weights.data()};
  }
};

// One target with the memory that it needs.
struct Target {
  AxisTable x, y;
  std::unique_ptr<uint8_t[]> mid;
  PreprocessTarget view;

  Target(int64_t H, int64_t W, int64_t columns, int64_t rows, int64_t S, void* out)
      : x(W, columns * S), y(H, rows * S) {
    // Pillow 13 takes the cheaper pass first where the height loses more than twice what the width
    // does; earlier releases always began with the horizontal one.
    const int64_t lost = H - rows * S;
    const bool vertical_first = W != columns * S && lost > 0 && lost > 2 * (W - columns * S);
    view = {.x = x.axis,
            .y = y.axis,
            .vertical_first = vertical_first,
            .columns = columns,
            .mid = nullptr,
            .out = out};
    // Left unset: the first stage fills it before the second reads it.
    mid.reset(new uint8_t[static_cast<size_t>(preprocess_mid_bytes(view))]);
    view.mid = mid.get();
  }
};

// Runs all blocks of a stage; each range has a scratch of its own.
template <class Stage>
void run(Stage stage, const PreprocessParams& p, int64_t blocks) {
  const size_t size = static_cast<size_t>(preprocess_scratch_bytes(p));
  std::atomic<bool> out_of_memory = false;
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint8_t[]> scratch(new (std::nothrow) uint8_t[size]);
    if (scratch) {
      stage(p, begin, end, scratch.get());
    } else {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

void preprocess(Tensor image, Tensor table, Tensor out, int64_t columns, int64_t rows,
                int64_t image_size, bool thumbnail) {
  Checker check("preprocess");
  check.tensor("image", image, {DType::u8}, {"H", "W", "3"});
  check.tensor("table", table, {out.dtype}, {"3", "256"});
  check.require(columns >= 0 && rows >= 0 && columns <= 1024 && rows <= 1024,
                "columns and rows are " + std::to_string(columns) + " and " + std::to_string(rows) +
                    ", allowed: 0 to 1024");
  check.require(image_size >= 1 && image_size <= 16384,
                "image_size is " + std::to_string(image_size) + ", allowed: 1 to 16384");
  check.bind("S", image_size, "image_size");
  check.bind("t", columns * rows + (thumbnail ? 1 : 0), "columns * rows and thumbnail");
  check.tensor("out", out, {DType::f32, DType::bf16}, {"t", "3", "S", "S"});
  check.require(out.contiguous(), "out is not contiguous");
  check.require(table.contiguous(), "table is not contiguous");
  const int64_t H = check["H"], W = check["W"], S = image_size;
  check.require(H >= 1 && W >= 1 && H <= kMaxSide && W <= kMaxSide,
                "image has shape " + image.shape_text() + ", allowed: sides of 1 to 16777216");
  check.require(W == 1 || image.stride(1) == 3,
                "image has a stride of " + std::to_string(image.stride(1)) +
                    " between pixels, expected 3: rows of packed RGB");
  if (check["t"] == 0) return;
  check.require(image.device == Device::cpu, "image is on a CUDA device, expected the CPU");

  std::vector<Target> targets;
  uint8_t* tiles = static_cast<uint8_t*>(out.data);
  if (columns * rows > 0) {
    targets.emplace_back(H, W, columns, rows, S, tiles);
    tiles += static_cast<size_t>(columns * rows * 3 * S * S) * size_of(out.dtype);
  }
  if (thumbnail) targets.emplace_back(H, W, 1, 1, S, tiles);
  PreprocessParams p{.image = static_cast<const uint8_t*>(image.data),
                     .H = H,
                     .W = W,
                     .row_stride = image.stride(0),
                     .S = S,
                     .n_targets = static_cast<int64_t>(targets.size()),
                     .targets = {},
                     .table = table.data,
                     .dtype = out.dtype};
  for (size_t i = 0; i < targets.size(); ++i) p.targets[i] = targets[i].view;
  run(first_stage.pick(), p, preprocess_first_blocks(p));
  run(second_stage.pick(), p, preprocess_second_blocks(p));
}

}  // namespace

IVR_BIND(preprocess) {
  m.def("preprocess", &preprocess, ReleaseGil(), py::arg("image"), py::arg("table"), py::arg("out"),
        py::arg("columns"), py::arg("rows"), py::arg("image_size"), py::arg("thumbnail"));
}

}  // namespace ivr
