#pragma once
// The way of a plain call to its kernel. What it looks at has left the processor's caches between
// the steps of a training, and Python would look at more on its way.

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace kfac_fast {

namespace py = pybind11;

class QuickCalls {
 public:
  using Objects = std::vector<py::object>;

  // `kernels` by operator; functions of Python without arguments, whose answers are true where
  // something listens; and context variables, which are not None where another implementation is
  // asked for.
  QuickCalls(py::dict kernels, Objects listeners, Objects requests)
      : kernels_(std::move(kernels)),
        listeners_(std::move(listeners)),
        requests_(std::move(requests)) {}

  // The kernel's answer to these arguments, or None.
  py::object operator()(py::handle op, const py::tuple& args) const {
    if (is_listened() || is_requested()) return py::none();
    const auto kernel =
        py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(kernels_.ptr(), op.ptr()));
    if (!kernel) return PyErr_Occurred() ? throw py::error_already_set() : py::none();
    PyObject* const* values = PySequence_Fast_ITEMS(args.ptr());
    return checked(PyObject_Vectorcall(kernel.ptr(), values, args.size(), nullptr));
  }

 private:
  static py::object checked(PyObject* made) {
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

  bool is_listened() const {
    for (const py::object& listener : listeners_) {
      const int answer = PyObject_IsTrue(checked(PyObject_CallNoArgs(listener.ptr())).ptr());
      if (answer < 0) throw py::error_already_set();
      if (answer) return true;
    }
    return false;
  }

  bool is_requested() const {
    for (const py::object& request : requests_) {
      PyObject* value = nullptr;
      if (PyContextVar_Get(request.ptr(), Py_None, &value) < 0) throw py::error_already_set();
      if (!py::reinterpret_steal<py::object>(value).is_none()) return true;
    }
    return false;
  }

  const py::dict kernels_;
  const Objects listeners_, requests_;
};

}  // namespace kfac_fast
