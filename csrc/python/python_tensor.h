#pragma once
// Tensors as pybind11 hands them to the CPU's operators: seen through DLPack, without the
// dispatcher and without a reference to count, which together take longer than a small kernel. So
// the caller holds the tensors until the call returns, those of a list by a list that is its own.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../cpu/tensors.h"
#include "dlpack.h"

namespace kfac_fast {

namespace py = pybind11;

// What is asked of torch's Python objects.
class Torch {
 public:
  static const Torch& get() {
    static const Torch& torch = *new Torch;  // Python's end is too late to let its objects go
    return torch;
  }

  // torch.Tensor and torch.nn.Parameter, but none of what derives from them: such may have no
  // memory, or mean something else by it.
  bool is_plain(py::handle object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    return type == tensor_.ptr() || type == parameter_.ptr();
  }

  // A view of a plain tensor on the CPU whose memory holds its values; empty if it is anything
  // else.
  std::optional<Tensor> view(py::handle object) const {
    dlpack::Tensor view;
    if (api_->view(object.ptr(), &view) != 0) {
      PyErr_Clear();  // without strides or without memory
      return {};
    }
    if (view.device != dlpack::cpu || is_negated(object)) return {};
    const Tensor tensor(static_cast<char*>(view.data) + view.byte_offset, scalar_type(view.type),
                        view.dims, view.sizes, view.strides);
    if (!view.data && tensor.numel() > 0) return {};  // zeros that nobody has written yet
    return tensor;
  }

  bool requires_grad(py::handle tensor) const {
    const auto answer =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), requires_grad_.ptr()));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

  // A new plain tensor on the CPU, of float32, float64 or int32. By torch.empty_strided, for
  // torch.empty passes more code that has left the processor's caches: twice the time.
  py::object empty(const Sizes& sizes, ScalarType type) const {
    py::tuple shape(sizes.size()), strides(sizes.size());
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      shape[d] = sizes[d];
      strides[d] = stride;
      stride *= std::max<int64_t>(sizes[d], 1);
    }
    const py::object& dtype = type == ScalarType::Double ? float64_
                              : type == ScalarType::Int  ? int32_
                                                         : float32_;
    return empty_strided_(shape, strides, py::arg("dtype") = dtype, py::arg("device") = cpu_);
  }

  // Lets autograd see that what it may have saved has changed.
  void increment_versions(const py::list& tensors) const { increment_version_(tensors); }

 private:
  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor_ = torch.attr("Tensor");
    parameter_ = torch.attr("nn").attr("Parameter");
    empty_strided_ = torch.attr("empty_strided");
    float32_ = torch.attr("float32");
    float64_ = torch.attr("float64");
    int32_ = torch.attr("int32");
    cpu_ = torch.attr("device")("cpu");
    is_negated_ = tensor_.attr("is_neg");
    requires_grad_ = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("requires_grad"));
    // What torch.autograd.graph.increment_version calls, for that is one more Python function.
    increment_version_ = torch.attr("_C").attr("_increment_version");
    const py::capsule capsule = tensor_.attr("__dlpack_c_exchange_api__");
    api_ = capsule.get_pointer<dlpack::ExchangeApi>();
    while (api_ && api_->major != dlpack::major_version) api_ = api_->older;
    if (!api_) throw py::import_error("kfac_fast: this torch does not offer DLPack 1");
  }

  // Whether the memory holds the values with the other sign, until the dispatcher sees them.
  bool is_negated(py::handle tensor) const {
    const auto answer =
        py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_negated_.ptr(), tensor.ptr()));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

  static ScalarType scalar_type(dlpack::DataType type) {
    switch (type.code << 8 | type.bits) {
      case dlpack::code_float << 8 | 32:
        return ScalarType::Float;
      case dlpack::code_float << 8 | 64:
        return ScalarType::Double;
      case dlpack::code_bfloat << 8 | 16:
        return ScalarType::BFloat16;
      case dlpack::code_float << 8 | 16:
        return ScalarType::Half;
      case dlpack::code_bool << 8 | 8:
        return ScalarType::Bool;
      case dlpack::code_int << 8 | 32:
        return ScalarType::Int;
      case dlpack::code_int << 8 | 64:
        return ScalarType::Long;
      default:
        return ScalarType::Undefined;
    }
  }

  py::object tensor_, parameter_, empty_strided_, float32_, float64_, int32_, cpu_;
  py::object is_negated_, requires_grad_, increment_version_;
  const dlpack::ExchangeApi* api_ = nullptr;
};

// A tensor that is written.
struct Output : Tensor {
  PyObject* object = nullptr;
};

// A float or an int, which Python's arithmetic does not tell apart.
struct Number {
  double value = 0;
};

// An int, a bool or a str, and nothing that could be made one.
template <typename T>
struct Exactly {
  T value{};
};

}  // namespace kfac_fast

namespace pybind11::detail {

template <>
struct type_caster<kfac_fast::Tensor> {
  PYBIND11_TYPE_CASTER(kfac_fast::Tensor, const_name("torch.Tensor"));

  bool load(handle object, bool) {
    const auto& torch = kfac_fast::Torch::get();
    if (!torch.is_plain(object)) return false;
    const auto view = torch.view(object);
    if (view) value = *view;
    return view.has_value();
  }
};

template <>
struct type_caster<kfac_fast::Output> {
  PYBIND11_TYPE_CASTER(kfac_fast::Output, const_name("torch.Tensor"));

  bool load(handle object, bool) {
    make_caster<kfac_fast::Tensor> tensor;
    if (!tensor.load(object, false)) return false;
    value = {static_cast<kfac_fast::Tensor&>(tensor), object.ptr()};
    return !kfac_fast::Torch::get().requires_grad(object);
  }
};

template <>
struct type_caster<kfac_fast::Number> {
  PYBIND11_TYPE_CASTER(kfac_fast::Number, const_name("float"));

  bool load(handle object, bool) {
    if (!PyFloat_Check(object.ptr()) && !PyLong_Check(object.ptr())) return false;
    value.value = PyFloat_AsDouble(object.ptr());
    if (value.value == -1 && PyErr_Occurred()) {
      PyErr_Clear();  // an int beyond floats
      return false;
    }
    return true;
  }
};

template <typename T>
struct type_caster<kfac_fast::Exactly<T>> {
  PYBIND11_TYPE_CASTER(kfac_fast::Exactly<T>, make_caster<T>::name);

  bool load(handle object, bool) {
    make_caster<T> exact;
    if (!is_one(object.ptr()) || !exact.load(object, false)) return false;
    value.value = cast_op<T>(exact);
    return true;
  }

 private:
  static bool is_one(PyObject* object) {
    if constexpr (std::is_same_v<T, bool>) return PyBool_Check(object);
    if constexpr (std::is_same_v<T, int64_t>) return PyLong_Check(object);
    return PyUnicode_Check(object);
  }
};

}  // namespace pybind11::detail
