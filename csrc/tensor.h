// A view of a tensor that lives in Python, read through the DLPack C exchange API.
//
// The extension does not link libtorch: torch.Tensor.__dlpack_c_exchange_api__ gives pointer,
// shape, strides, dtype, device and the current stream in a fraction of a microsecond, and one
// build serves every torch version that has it (2.10 and later).
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "kernels/dtype.h"

struct _object;  // PyObject: reading pybind11 here would cost every host file seconds

namespace ivr {

enum class Device : int32_t { cpu = 1, cuda = 2 };  // DLPack's numbers

struct Tensor {
  static constexpr int kMaxDims = 6;

  void* data = nullptr;
  DType dtype = DType::f32;
  const char* foreign_dtype = nullptr;  // the name of one that no op takes; Checker refuses it
  Device device = Device::cpu;
  int32_t device_index = 0;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // Negative indices count from the last dimension.
  int64_t size(int i) const { return shape[i < 0 ? ndim + i : i]; }
  int64_t stride(int i) const { return strides[i < 0 ? ndim + i : i]; }
  bool contiguous() const;
  std::string shape_text() const;  // "[4, 896]"
};

const char* name_of(DType t);

// Reads the exchange API of torch.Tensor once; throws ImportError where torch is too old.
void init_exchange_api();

// Raises TypeError for anything that is not a tensor with memory on a supported device.
Tensor view(_object* object);

// The stream that torch currently uses on a CUDA device.
void* current_stream(int device_index);

}  // namespace ivr
