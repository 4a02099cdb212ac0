// Every csrc/ops/<op>.cpp binds itself: IVR_BIND(rms_norm) { m.def("rms_norm", ...); }
// so that adding an op edits no list.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "csrc/check.h"
#include "csrc/cpu_isa.h"
#include "csrc/parallel.h"
#include "csrc/tensor.h"

namespace pybind11::detail {

template <>
struct type_caster<ivr::Tensor> {
  PYBIND11_TYPE_CASTER(ivr::Tensor, const_name("torch.Tensor"));
  bool load(handle src, bool) {
    // None belongs to std::optional<Tensor>; anything else is read or refused with a reason.
    if (src.is_none()) return false;
    value = ivr::view(src.ptr());
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
