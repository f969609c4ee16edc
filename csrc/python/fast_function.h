#pragma once
// Functions of Python that cost little to call: their arguments are positional and loaded in order,
// and where one does not load, or there are more or fewer, they return None. pybind11's choice
// among overloads takes as long as a small kernel once it has left the processor's caches.

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace kfac_fast {

namespace py = pybind11;

template <typename Function>
class FastFunction {
 public:
  // Python's function of this name, which owns `function`.
  static py::object make(const std::string& name, Function function) {
    auto* self = new FastFunction(name, std::move(function));
    const py::capsule owner(self, [](void* it) { delete static_cast<FastFunction*>(it); });
    const py::str module("kfac_fast._C");
    return py::reinterpret_steal<py::object>(
        PyCFunction_NewEx(&self->method_, owner.ptr(), module.ptr()));
  }

 private:
  FastFunction(const std::string& name, Function function)
      : name_(name), function_(std::move(function)) {
    method_.ml_name = name_.c_str();
    method_.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&called));
    method_.ml_flags = METH_FASTCALL;
  }

  static PyObject* called(PyObject* owner, PyObject* const* args, Py_ssize_t count) {
    auto* self = static_cast<FastFunction*>(PyCapsule_GetPointer(owner, nullptr));
    try {
      return self->call(args, count, Signature{}).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  template <typename>
  struct Type {};  // says which, as an argument
  using Signature = Type<py::detail::function_signature_t<Function>>;

  template <typename... Args>
  py::object call(PyObject* const* args, Py_ssize_t count, Type<py::object(Args...)>) {
    if (count != sizeof...(Args)) return py::none();
    std::tuple<py::detail::make_caster<Args>...> loaders;
    return call_loaded<Args...>(args, loaders, std::index_sequence_for<Args...>{});
  }

  template <typename... Args, typename Loaders, size_t... I>
  py::object call_loaded(PyObject* const* args, Loaders& loaders, std::index_sequence<I...>) {
    if (!(std::get<I>(loaders).load(args[I], false) && ...)) return py::none();
    return function_(py::detail::cast_op<Args>(std::move(std::get<I>(loaders)))...);
  }

  const std::string name_;
  Function function_;
  PyMethodDef method_{};
};

}  // namespace kfac_fast
