#include "kernels/preprocess.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "csrc/bind.h"
#include "csrc/cuda.h"

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

// Room for the weights of one output: the filter's support, in pairs. Shrinking widens the filter.
int64_t resample_taps(int64_t n_in, int64_t n_out) {
  const double scale = static_cast<double>(n_in) / static_cast<double>(n_out);
  const double support = 2.0 * (scale < 1.0 ? 1.0 : scale);
  return (static_cast<int64_t>(std::ceil(support)) * 2 + 2) / 2 * 2;
}

// The weights of one axis. The order of the double precision operations is Pillow's, so that every
// weight rounds to the same fixed-point number.
struct AxisTable {
  std::vector<int32_t> first, count;
  std::vector<int16_t> weights;
  ResampleAxis axis{};

  AxisTable(int64_t n_in, int64_t n_out) {
    const double scale = static_cast<double>(n_in) / static_cast<double>(n_out);
    const double stretch = scale < 1.0 ? 1.0 : scale;
    const double support = 2.0 * stretch;
    const double inverse = 1.0 / stretch;
    const int64_t taps = resample_taps(n_in, n_out);
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

// Pillow 13 takes the cheaper pass first where the height loses more than twice what the width
// does; earlier releases always began with the horizontal one.
bool vertical_first(int64_t H, int64_t W, int64_t height, int64_t width) {
  const int64_t lost = H - height;
  return W != width && lost > 0 && lost > 2 * (W - width);
}

// One target with the memory that it needs.
struct Target {
  AxisTable x, y;
  std::unique_ptr<uint8_t[]> mid;
  PreprocessTarget view;

  Target(int64_t H, int64_t W, int64_t columns, int64_t rows, int64_t S, void* out)
      : x(W, columns * S), y(H, rows * S) {
    view = {.x = x.axis,
            .y = y.axis,
            .vertical_first = vertical_first(H, W, rows * S, columns * S),
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

// What a call is asked for, checked.
struct Request {
  int64_t H, W, columns, rows, S;
  bool thumbnail;
};

Request checked(Checker& check, const Tensor& image, const Tensor& table, const Tensor& out,
                int64_t columns, int64_t rows, int64_t image_size, bool thumbnail) {
  check.tensor("image", image, {DType::u8}, {"H", "W", "3"});
  check.tensor("table", table, {out.dtype}, {"3", "256"});
  check.require(columns >= 0 && rows >= 0 && columns <= 1024 && rows <= 1024,
                "columns and rows are ", columns, " and ", rows, ", allowed: 0 to 1024");
  check.require(image_size >= 1 && image_size <= 16384, "image_size is ", image_size,
                ", allowed: 1 to 16384");
  check.bind("S", image_size, "image_size");
  check.bind("t", columns * rows + (thumbnail ? 1 : 0), "columns * rows and thumbnail");
  check.tensor("out", out, {DType::f32, DType::bf16}, {"t", "3", "S", "S"});
  check.require(out.contiguous(), "out is not contiguous");
  check.require(table.contiguous(), "table is not contiguous");
  const int64_t H = check["H"], W = check["W"];
  check.require(H >= 1 && W >= 1 && H <= kMaxSide && W <= kMaxSide, "image has shape ", image,
                ", allowed: sides of 1 to 16777216");
  check.require(W == 1 || image.stride(1) == 3, "image has a stride of ", image.stride(1),
                " between pixels, expected 3: rows of packed RGB");
  return {H, W, columns, rows, image_size, thumbnail};
}

PreprocessParams params_of(const Request& r, const Tensor& image, const Tensor& table,
                           const Tensor& out) {
  return {.image = static_cast<const uint8_t*>(image.data),
          .H = r.H,
          .W = r.W,
          .row_stride = image.stride(0),
          .S = r.S,
          .n_targets = 0,
          .targets = {},
          .table = table.data,
          .dtype = out.dtype};
}

void preprocess(Tensor image, Tensor table, Tensor out, int64_t columns, int64_t rows,
                int64_t image_size, bool thumbnail) {
  Checker check("preprocess");
  const Request r = checked(check, image, table, out, columns, rows, image_size, thumbnail);
  if (check["t"] == 0) return;
  check.require(image.device == Device::cpu, "image is on a CUDA device, expected the CPU");

  std::vector<Target> targets;
  uint8_t* tiles = static_cast<uint8_t*>(out.data);
  if (columns * rows > 0) {
    targets.emplace_back(r.H, r.W, columns, rows, r.S, tiles);
    tiles += static_cast<size_t>(columns * rows * 3 * r.S * r.S) * size_of(out.dtype);
  }
  if (thumbnail) targets.emplace_back(r.H, r.W, 1, 1, r.S, tiles);
  PreprocessParams p = params_of(r, image, table, out);
  for (const Target& target : targets) p.targets[p.n_targets++] = target.view;
  run(first_stage.pick(), p, preprocess_first_blocks(p));
  run(second_stage.pick(), p, preprocess_second_blocks(p));
}

// ---- on a GPU: the host makes the weights, the caller brings them and all memory there
// -----------

// Memory handed out piece by piece, each on 16 bytes; with a null base it only counts.
struct Arena {
  uint8_t* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
};

ResampleAxis place_axis(Arena& tables, int64_t n_in, int64_t n_out) {
  const int64_t taps = resample_taps(n_in, n_out);
  return {.n_in = n_in,
          .n_out = n_out,
          .taps = taps,
          .first = tables.take<int32_t>(n_out),
          .count = tables.take<int32_t>(n_out),
          .weights = tables.take<int16_t>(n_out * 2 * taps)};
}

// The targets of a request in the order of out, with everything but `out` in its place.
std::vector<PreprocessTarget> place_targets(const Request& r, Arena& tables, Arena& mids) {
  std::vector<PreprocessTarget> targets;
  const auto place = [&](int64_t columns, int64_t rows) {
    PreprocessTarget t{.x = place_axis(tables, r.W, columns * r.S),
                       .y = place_axis(tables, r.H, rows * r.S),
                       .vertical_first = vertical_first(r.H, r.W, rows * r.S, columns * r.S),
                       .columns = columns,
                       .mid = nullptr,
                       .out = nullptr};
    t.mid = mids.take<uint8_t>(preprocess_mid_bytes(t));
    targets.push_back(t);
  };
  if (r.columns * r.rows > 0) place(r.columns, r.rows);
  if (r.thumbnail) place(1, 1);
  return targets;
}

// Bytes of the weights, and of the weights with the pictures between the passes behind them.
std::pair<int64_t, int64_t> workspace_bytes(const Request& r) {
  Arena tables{nullptr}, mids{nullptr};
  place_targets(r, tables, mids);
  return {tables.used, tables.used + mids.used};
}

std::pair<int64_t, int64_t> preprocess_workspace(Tensor image, Tensor table, Tensor out,
                                                 int64_t columns, int64_t rows, int64_t image_size,
                                                 bool thumbnail) {
  Checker check("preprocess");
  return workspace_bytes(checked(check, image, table, out, columns, rows, image_size, thumbnail));
}

// tables: [first of workspace_bytes] on the CPU, to be copied to the start of the workspace.
void preprocess_tables(Tensor tables, int64_t H, int64_t W, int64_t columns, int64_t rows,
                       int64_t image_size, bool thumbnail) {
  const Request r{H, W, columns, rows, image_size, thumbnail};
  Checker check("preprocess");
  check.bind("bytes", workspace_bytes(r).first, "the picture and the grid");
  check.tensor("tables", tables, {DType::u8}, {"bytes"});
  require_cpu(check, tables);
  Arena arena{static_cast<uint8_t*>(tables.data)}, mids{nullptr};
  const auto fill = [](const ResampleAxis& to) {
    const AxisTable made(to.n_in, to.n_out);
    const auto copy = [](const void* target, const auto& v) {
      std::memcpy(const_cast<void*>(target), v.data(), v.size() * sizeof(v[0]));
    };
    copy(to.first, made.first);
    copy(to.count, made.count);
    copy(to.weights, made.weights);
  };
  for (const PreprocessTarget& t : place_targets(r, arena, mids)) {
    fill(t.x);
    fill(t.y);
  }
}

void preprocess_cuda(Tensor image, Tensor table, Tensor out, int64_t columns, int64_t rows,
                     int64_t image_size, bool thumbnail, Tensor workspace) {
  Checker check("preprocess");
  const Request r = checked(check, image, table, out, columns, rows, image_size, thumbnail);
  const auto [table_bytes, bytes] = workspace_bytes(r);
  check.bind("bytes", bytes, "the picture and the grid");
  check.tensor("workspace", workspace, {DType::u8}, {"bytes"});
  if (check["t"] == 0) return;
  Arena tables{static_cast<uint8_t*>(workspace.data)};
  Arena mids{static_cast<uint8_t*>(workspace.data) + table_bytes};
  uint8_t* tiles = static_cast<uint8_t*>(out.data);
  PreprocessParams p = params_of(r, image, table, out);
  for (PreprocessTarget& t : place_targets(r, tables, mids)) {
    t.out = tiles;
    tiles += 3 * t.x.n_out * t.y.n_out * static_cast<int64_t>(size_of(out.dtype));
    p.targets[p.n_targets++] = t;
  }
  check.require(ran_on_cuda(check, IVR_CUDA_KERNEL(preprocess), p, image),
                "image is on the CPU, expected a CUDA device");
}

}  // namespace

IVR_BIND(preprocess) {
  m.def("preprocess", &preprocess, ReleaseGil(), py::arg("image"), py::arg("table"), py::arg("out"),
        py::arg("columns"), py::arg("rows"), py::arg("image_size"), py::arg("thumbnail"));
  m.def("preprocess_workspace", &preprocess_workspace, py::arg("image"), py::arg("table"),
        py::arg("out"), py::arg("columns"), py::arg("rows"), py::arg("image_size"),
        py::arg("thumbnail"));
  m.def("preprocess_tables", &preprocess_tables, ReleaseGil(), py::arg("tables"), py::arg("H"),
        py::arg("W"), py::arg("columns"), py::arg("rows"), py::arg("image_size"),
        py::arg("thumbnail"));
  m.def("preprocess_cuda", &preprocess_cuda, ReleaseGil(), py::arg("image"), py::arg("table"),
        py::arg("out"), py::arg("columns"), py::arg("rows"), py::arg("image_size"),
        py::arg("thumbnail"), py::arg("workspace"));
}

}  // namespace ivr
