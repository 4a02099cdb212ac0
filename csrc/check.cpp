#include "csrc/check.h"

#include <cctype>
#include <stdexcept>

namespace ivr {

void Checker::fail(const std::string& what) const {
  throw std::invalid_argument(std::string(op_) + ": " + what);
}

const Checker::Binding* Checker::find(const std::string& name) const {
  for (const Binding& b : bindings_) {
    if (b.name == name) return &b;
  }
  return nullptr;
}

void Checker::bind(const char* dim, int64_t value, const char* origin) {
  bindings_.push_back({dim, value, origin});
}

int64_t Checker::operator[](const char* dim) const {
  const Binding* b = find(dim);
  if (!b) fail(std::string("dimension ") + dim + " is not bound");
  return b->value;
}

void Checker::tensor(const char* name, const Tensor& t, std::initializer_list<DType> dtypes,
                     std::initializer_list<const char*> dims) {
  bool allowed = false;
  std::string names;
  for (DType d : dtypes) {
    allowed |= d == t.dtype;
    names += (names.empty() ? "" : " or ") + std::string(name_of(d));
  }
  if (!allowed) fail(std::string(name) + " is " + name_of(t.dtype) + ", expected " + names);

  if (has_device_ && (t.device != device_ || t.device_index != device_index_)) {
    fail(std::string(name) + " is on another device than the tensors before it");
  }
  has_device_ = true;
  device_ = t.device;
  device_index_ = t.device_index;

  bool matches = t.ndim == static_cast<int>(dims.size());
  int i = 0;
  std::string expected, origins;
  for (const char* dim : dims) {
    int64_t want;
    std::string text = dim;
    if (std::isdigit(static_cast<unsigned char>(dim[0]))) {
      want = std::stoll(dim);
    } else if (const Binding* b = find(dim)) {
      want = b->value;
      text += "=" + std::to_string(want);
      origins += (origins.empty() ? "" : ", ") + std::string(dim) + " from " + b->origin;
    } else {
      want = matches ? t.shape[i] : -1;
      if (matches) bindings_.push_back({dim, want, std::string(name) + " " + t.shape_text()});
    }
    if (matches && t.shape[i] != want) matches = false;
    expected += (i ? ", " : "") + text;
    ++i;
  }
  if (!matches) {
    fail(std::string(name) + " has shape " + t.shape_text() + ", expected [" + expected + "]" +
         (origins.empty() ? "" : " (" + origins + ")"));
  }
  if (t.ndim > 0 && t.size(-1) > 1 && t.stride(-1) != 1) {
    fail(std::string(name) + " must be contiguous in its last dimension (stride " +
         std::to_string(t.stride(-1)) + ")");
  }
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
