// Every csrc/ops/<op>.cpp binds itself: IVR_BIND(rms_norm) { m.def("rms_norm", ...); }
// so that adding an op edits no list.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "csrc/check.h"
#include "csrc/cpu_isa.h"
#include "csrc/parallel.h"
#include "csrc/tensor.h"

namespace ivr {

// Calls of ops that were noted instead of made, and the tensors that they are about.
struct Tape {
  std::vector<std::function<void()>> calls;
  std::vector<pybind11::object> tensors;
};

extern thread_local Tape* recording;  // what this thread's calls go to; null where they are made

// An op as Python gets it.
template <class Result, class... Arguments>
auto recordable(Result (*op)(Arguments...)) {
  return [op](Arguments... arguments) -> Result {
    if (!recording) return op(std::move(arguments)...);
    recording->calls.push_back([op, arguments...] { op(arguments...); });
    return Result();
  };
}

}  // namespace ivr

namespace pybind11::detail {

template <>
struct type_caster<ivr::Tensor> {
  PYBIND11_TYPE_CASTER(ivr::Tensor, const_name("torch.Tensor"));
  bool load(handle src, bool) {
    // None belongs to std::optional<Tensor>; anything else is read or refused with a reason.
    if (src.is_none()) return false;
    value = ivr::view(src.ptr());
    if (ivr::recording) ivr::recording->tensors.push_back(reinterpret_borrow<object>(src));
    return true;
  }
};

}  // namespace pybind11::detail

namespace ivr {

namespace py = pybind11;

struct Binding {
  using Fn = void (*)(py::module_& m);
  explicit Binding(Fn fn);
};

// Ops run without the GIL; their arguments have been read by then.
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

}  // namespace ivr

#define IVR_BIND(op)                                 \
  static void bind_##op(pybind11::module_& m);       \
  static const ivr::Binding binding_##op(bind_##op); \
  static void bind_##op(pybind11::module_& m)
