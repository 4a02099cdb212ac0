// Named dimensions, checked in one statement.
//
//   Checker check("rms_norm");
//   const int64_t T = check.dim("T"), ...
//   check.tensor("x", x, {DType::f32, DType::bf16}, {"T", "C"});
//   check.tensor("weight", weight, {x.dtype}, {"C"});
//
// The first tensor that carries a name binds it; later ones must agree, and a mismatch says where
// the name was bound: "rms_norm: weight has shape [895], expected [C=896] (C from x [4, 896])".
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "csrc/tensor.h"

namespace ivr {

class Checker {
 public:
  explicit Checker(const char* op);

  // dims are names, or decimal numbers for fixed sizes. The last dimension must be contiguous
  // unless it has at most one element. All tensors of an op must be on one device.
  void tensor(const char* name, const Tensor& t, std::initializer_list<DType> dtypes,
              std::initializer_list<const char*> dims);

  // Refuses an output of rows [M, N] that shares memory with an input [M, K] of the op. Rows of one
  // stride may lie side by side.
  void apart(const char* output, const Tensor& out, const char* input, const Tensor& x) const;

  // Gives a name a value that no tensor binds.
  void bind(const char* dim, int64_t value, const char* origin);
  int64_t operator[](const char* dim) const;

  // Throws ValueError "op: <parts, one after the other>" unless the condition holds. Texts, numbers
  // and shapes of tensors are put together only then: a call that is right makes no strings.
  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (!condition) fail((std::string() + ... + text_of(parts)));
  }
  [[noreturn]] void fail(const std::string& what) const;

 private:
  struct Binding {
    std::string name;
    int64_t value;
    const char* origin;
    std::optional<Tensor> tensor;  // of which `origin` is the name
  };
  static std::string text_of(const char* text) { return text; }
  static std::string text_of(const std::string& text) { return text; }
  static std::string text_of(const Tensor& t) { return t.shape_text(); }
  template <class Number>
  static std::string text_of(Number number) {
    return std::to_string(number);
  }
  // The first `known` bindings are those of the tensors before t.
  [[noreturn]] void refuse_shape(const char* name, const Tensor& t,
                                 std::initializer_list<const char*> dims, size_t known) const;
  const Binding* find(const char* name) const;

  const char* op_;
  std::vector<Binding> bindings_;
  bool has_device_ = false;
  Device device_ = Device::cpu;
  int32_t device_index_ = 0;
};

// cu is 0 = cu[0] <= cu[1] .. <= cu[B] = total, a bound name. On the CPU only.
void check_offsets(const Checker& check, const char* name, const Tensor& cu, const char* total);

}  // namespace ivr
