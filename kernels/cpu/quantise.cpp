// Weights on their way into a panel of int8 or int4 codes. What codes and scales are is defined in
// python/internvl_rt/ops/quantise.py, how they are packed in kernels/linear.h.
#include "kernels/cpu/simd.h"
#include "kernels/linear.h"

namespace ivr {
namespace {

constexpr int64_t kAhead = 512;  // bytes of a row that are fetched in advance
constexpr int64_t kVectors = kQuantGroup / kLanes;
constexpr int64_t kLine = kPanelColumns * 4;  // bytes

struct Range {
  float low, high;
  bool tame;  // neither NaN nor infinite
};

template <class T>
Range take_group(const T* row, int64_t n, F* v) {
  F low = set(0.0f), high = set(0.0f), nothing = set(0.0f);
  for (int64_t i = 0; i < kVectors; ++i) {
    v[i] = load_rest(row + i * kLanes, n - i * kLanes);
    low = min(low, v[i]);
    high = max(high, v[i]);
    nothing = nothing + v[i] * set(0.0f);
  }
  return {-largest(set(0.0f) - low), largest(high), sum(nothing) == 0.0f};
}

// What a code stands for, as in ops/quantise.py.
float scale_of(Range range, WeightFormat format) {
  const bool high = range.high > -range.low;
  const float scale = format == WeightFormat::int8 ? (high ? range.high : -range.low) / 127.0f
                                                   : (high ? range.high : range.low) / -8.0f;
  const float stored = to_float(to_bf16(scale));
  constexpr float kLeast = 0x1p-126f;
  return stored < kLeast && -stored < kLeast ? 0.0f : stored;
}

// The codes of column `column` of a group, four or eight k to a line.
void put_codes(const uint8_t* q, WeightFormat format, int64_t column, char* lines) {
  for (int64_t k = 0; k < kQuantGroup; k += 4, lines += kLine) {
    uint32_t four;
    memcpy(&four, q + k, 4);
    if (format == WeightFormat::int4) {
      uint32_t next;
      memcpy(&next, q + (k += 4), 4);
      four |= next << 4;
    }
    memcpy(lines + column * 4, &four, 4);
  }
}

template <class T>
bool quantise_group(const T* row, int64_t n, WeightFormat format, int64_t column, char* group) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const int most = format == WeightFormat::int8 ? 127 : 7, offset = most + 1;
  const F least_code = set(format == WeightFormat::int8 ? -127.0f : -8.0f);
  F v[kVectors];
  const Range range = take_group(row, n, v);
  const float scale = scale_of(range, format);
  const F divisor = set(scale == 0.0f ? 1.0f : scale);
  uint8_t q[kQuantGroup];
  for (int64_t i = 0; i < kVectors; ++i) {
    const F code = min(set(static_cast<float>(most)), max(least_code, round_even(v[i] / divisor)));
    const Bytes bytes = __builtin_convertvector(to_ints(code) + offset, Bytes);
    memcpy(q + i * kLanes, &bytes, kLanes);
  }
  put(reinterpret_cast<bf16*>(group) + column, scale);
  put_codes(q, format, column, group + kScaleBytes);
  return range.tame;
}

// Returns whether all weights are finite.
template <class T>
bool quantise(const void* const* rows, int64_t K, WeightFormat format, char* panel) {
  bool tame = true;
  for (int64_t k = 0; k < K; k += kQuantGroup, panel += panel_bytes(format, kQuantGroup)) {
    for (int64_t r = 0; r < kPanelColumns; ++r) {
      const T* row = static_cast<const T*>(rows[r]);
      if (row) __builtin_prefetch(reinterpret_cast<const char*>(row + k) + kAhead);
      // Columns beyond N are zeros.
      tame &= quantise_group(row ? row + k : row, row ? K - k : 0, format, r, panel);
    }
  }
  return tame;
}

}  // namespace

namespace IVR_ISA {

void quantise_panel(const void* const* rows, int64_t K, DType dtype, WeightFormat format,
                    void* panel, bool& finite) {
  char* to = static_cast<char*>(panel);
  finite = dtype == DType::f32 ? quantise<float>(rows, K, format, to)
                               : quantise<bf16>(rows, K, format, to);
}

}  // namespace IVR_ISA
}  // namespace ivr
