#include "csrc/tensor.h"

#include <pybind11/pybind11.h>

namespace ivr {

namespace py = pybind11;

namespace {

// The part of DLPack 1.x that is used here, as its specification lays it out.
struct DLVersion {
  uint32_t major, minor;
};
struct DLDevice {
  int32_t type, index;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  DLVersion version;
  ExchangeApi* previous;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void** out);
};

ExchangeApi* api = nullptr;
PyTypeObject* tensor_type = nullptr;

constexpr int dtype_key(int code, int bits) { return code << 8 | bits; }

// The dtypes of ops, the commonest first, and those of torch that only have a name here.
enum { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };
constexpr struct {
  int key;
  DType dtype;
  const char* foreign;
} kDtypes[] = {
    {dtype_key(kBfloat, 16), DType::bf16, nullptr},
    {dtype_key(kFloat, 32), DType::f32, nullptr},
    {dtype_key(kUInt, 8), DType::u8, nullptr},
    {dtype_key(kInt, 32), DType::i32, nullptr},
    {dtype_key(kInt, 64), DType::i64, nullptr},
    {dtype_key(kFloat, 16), DType::f32, "float16"},
    {dtype_key(kFloat, 64), DType::f32, "float64"},
    {dtype_key(kInt, 8), DType::f32, "int8"},
    {dtype_key(kInt, 16), DType::f32, "int16"},
    {dtype_key(kBool, 8), DType::f32, "bool"},
    {dtype_key(kComplex, 64), DType::f32, "complex64"},
};

void read_dtype(DLDataType t, Tensor& v) {
  for (const auto& known : kDtypes) {
    if (t.lanes != 1 || known.key != dtype_key(t.code, t.bits)) continue;
    v.dtype = known.dtype;
    v.foreign_dtype = known.foreign;
    return;
  }
  v.foreign_dtype = "of a dtype that no op takes";
}

// What torch says in many lines, a trace of its own code among them, in one.
[[noreturn]] void refuse_unreadable() {
  std::string reason = "it is no ordinary tensor";
  if (PyErr_Occurred()) {
    const py::error_already_set error;
    reason = py::str(error.value());
  }
  throw py::type_error("tensor cannot be read: " + reason.substr(0, reason.find('\n')));
}

}  // namespace

bool Tensor::contiguous() const {
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

std::string Tensor::shape_text() const {
  std::string s = "[";
  for (int i = 0; i < ndim; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

const char* name_of(DType t) {
  switch (t) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::u8:
      return "uint8";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
  }
  return "?";
}

void init_exchange_api() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
    throw py::import_error(
        "internvl_rt needs torch >= 2.10: this torch has no "
        "Tensor.__dlpack_c_exchange_api__");
  }
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->version.major != 1) api = api->previous;
  if (!api || !api->tensor_from_object) {
    throw py::import_error("internvl_rt: torch offers no DLPack 1.x exchange API");
  }
  // Both live as long as the process: torch.Tensor is never unloaded.
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
}

Tensor view(PyObject* object) {
  if (!PyObject_TypeCheck(object, tensor_type)) {
    throw py::type_error(std::string("expected a torch.Tensor, got ") + Py_TYPE(object)->tp_name);
  }
  DLTensor t;
  if (api->tensor_from_object(object, &t) != 0) refuse_unreadable();
  Tensor v;
  if (t.ndim > Tensor::kMaxDims) {
    throw py::value_error("tensor has " + std::to_string(t.ndim) +
                          " dimensions, at most 6 allowed");
  }
  read_dtype(t.dtype, v);
  if (t.device.type != static_cast<int32_t>(Device::cpu) &&
      t.device.type != static_cast<int32_t>(Device::cuda)) {
    throw py::type_error("tensor is neither on the CPU nor on a CUDA device");
  }
  v.device = static_cast<Device>(t.device.type);
  v.device_index = t.device.index;
  v.ndim = t.ndim;
  for (int i = 0; i < t.ndim; ++i) {
    v.shape[i] = t.shape[i];
    v.strides[i] = t.strides ? t.strides[i] : 0;
  }
  if (!t.strides) {
    int64_t expected = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      v.strides[i] = expected;
      expected *= v.shape[i];
    }
  }
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  // FakeTensors come through with no memory behind them.
  if (!t.data && v.numel() > 0) throw py::type_error("tensor has no data (a fake or meta tensor?)");
  return v;
}

void* current_stream(int device_index) {
  void* stream = nullptr;
  if (api->current_work_stream(static_cast<int32_t>(Device::cuda), device_index, &stream) != 0) {
    if (PyErr_Occurred()) throw py::error_already_set();
    throw std::runtime_error("torch gave no current CUDA stream");
  }
  return stream;
}

}  // namespace ivr
