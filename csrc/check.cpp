#include "csrc/check.h"

#include <algorithm>
#include <cctype>
#include <stdexcept>

namespace ivr {

namespace {

constexpr size_t kUsualDims = 12;

bool is_number(const char* dim) { return std::isdigit(static_cast<unsigned char>(dim[0])); }

}  // namespace

Checker::Checker(const char* op) : op_(op) { bindings_.reserve(kUsualDims); }

void Checker::fail(const std::string& what) const {
  throw std::invalid_argument(std::string(op_) + ": " + what);
}

const Checker::Binding* Checker::find(const char* name) const {
  for (const Binding& b : bindings_) {
    if (b.name == name) return &b;
  }
  return nullptr;
}

void Checker::apart(const char* output, const Tensor& out, const char* input,
                    const Tensor& x) const {
  struct Rows {
    int64_t at, row, step, end;  // bytes
  };
  const auto rows_of = [](const Tensor& t) -> Rows {
    const int64_t at = reinterpret_cast<int64_t>(t.data);
    const int64_t element = static_cast<int64_t>(size_of(t.dtype));
    const int64_t row = t.size(1) * element, step = t.stride(0) * element;
    return {at, row, step, at + (t.size(0) - 1) * step + row};
  };
  if (out.numel() == 0 || x.numel() == 0) return;
  const Rows a = rows_of(out), b = rows_of(x);
  if (a.end <= b.at || b.end <= a.at) return;
  if (a.step == b.step && a.step > 0) {
    // Where a row of x begins beside one of out.
    const int64_t column = ((b.at - a.at) % a.step + a.step) % a.step;
    if (column >= a.row && column + b.row <= a.step) return;
  }
  fail(std::string(output) + " overlaps " + input + ", expected memory of its own");
}

void Checker::bind(const char* dim, int64_t value, const char* origin) {
  bindings_.push_back({dim, value, origin, std::nullopt});
}

int64_t Checker::operator[](const char* dim) const {
  const Binding* b = find(dim);
  if (!b) fail(std::string("dimension ") + dim + " is not bound");
  return b->value;
}

void Checker::tensor(const char* name, const Tensor& t, std::initializer_list<DType> dtypes,
                     std::initializer_list<const char*> dims) {
  if (t.foreign_dtype || std::find(dtypes.begin(), dtypes.end(), t.dtype) == dtypes.end()) {
    std::string names;
    for (DType d : dtypes) names += (names.empty() ? "" : " or ") + std::string(name_of(d));
    const char* found = t.foreign_dtype ? t.foreign_dtype : name_of(t.dtype);
    fail(std::string(name) + " is " + found + ", expected " + names);
  }

  if (has_device_ && (t.device != device_ || t.device_index != device_index_)) {
    fail(std::string(name) + " is on another device than the tensors before it");
  }
  has_device_ = true;
  device_ = t.device;
  device_index_ = t.device_index;

  const size_t known = bindings_.size();
  if (t.ndim != static_cast<int>(dims.size())) refuse_shape(name, t, dims, known);
  int i = 0;
  for (const char* dim : dims) {
    const int64_t size = t.shape[i++];
    if (is_number(dim)) {
      if (size != std::stoll(dim)) refuse_shape(name, t, dims, known);
    } else if (const Binding* b = find(dim)) {
      if (size != b->value) refuse_shape(name, t, dims, known);
    } else {
      bindings_.push_back({dim, size, name, t});
    }
  }
  if (t.ndim > 0 && t.size(-1) > 1 && t.stride(-1) != 1) {
    fail(std::string(name) + " must be contiguous in its last dimension (stride " +
         std::to_string(t.stride(-1)) + ")");
  }
}

void Checker::refuse_shape(const char* name, const Tensor& t,
                           std::initializer_list<const char*> dims, size_t known) const {
  std::string expected, origins;
  for (const char* dim : dims) {
    expected += (expected.empty() ? "" : ", ") + std::string(dim);
    const Binding* b = is_number(dim) ? nullptr : find(dim);
    if (!b || b >= bindings_.data() + known) continue;
    expected += "=" + std::to_string(b->value);
    origins += (origins.empty() ? "" : ", ") + std::string(dim) + " from " + b->origin;
    if (b->tensor) origins += " " + b->tensor->shape_text();
  }
  fail(std::string(name) + " has shape " + t.shape_text() + ", expected [" + expected + "]" +
       (origins.empty() ? "" : " (" + origins + ")"));
}

void check_offsets(const Checker& check, const char* name, const Tensor& cu, const char* total) {
  const int32_t* offsets = static_cast<const int32_t*>(cu.data);
  const int64_t n = cu.size(0);
  const auto at = [&](int64_t i) {
    return std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(offsets[i]);
  };
  if (offsets[0] != 0) check.fail(at(0) + ", expected 0");
  for (int64_t i = 1; i < n; ++i) {
    if (offsets[i] < offsets[i - 1])
      check.fail(at(i) + " after " + at(i - 1) + ": it must not fall");
  }
  if (offsets[n - 1] != check[total]) {
    check.fail(at(n - 1) + ", expected " + total + " = " + std::to_string(check[total]));
  }
}

}  // namespace ivr
