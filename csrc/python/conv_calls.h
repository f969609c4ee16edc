#pragma once
// The kernels of the convolutions that have been called, with their plans. Finding one takes less
// than a call of a Python function; making one takes thousands of those.

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "../cpu/operators.h"
#include "../tensor_lists.h"

namespace kfac_fast {

namespace py = pybind11;

class ConvCalls {
 public:
  // As in kfac_fast/schema.py, from kernel_size to output_padding.
  using Geometry = std::array<py::handle, 8>;

  // `plan` is called as plan(op, shape, item size, *geometry) and returns a ConvKernel; what it
  // raises about the geometry is the caller's to see.
  ConvCalls(py::str op, py::object plan) : op_(std::move(op)), plan_(std::move(plan)) {}

  // The kernel for an input of this shape and dtype; null if the geometry is not made of ints,
  // strings and tuples or lists of ints.
  std::shared_ptr<ConvKernel> find(const Tensor& x, const Geometry& geometry) {
    Key key;
    key.add(static_cast<int64_t>(x.scalar_type()), x.dim());
    for (int64_t d = 0; d < x.dim(); ++d) key.add(x.size(d));
    for (const py::handle value : geometry) {
      if (!key.add(value)) return nullptr;
    }
    const auto found = kernels_.find(key);
    if (found != kernels_.end()) return found->second;
    if (kernels_.size() >= most) kernels_.clear();
    return kernels_[key] = make(x, geometry);
  }

 private:
  static constexpr size_t most = 1024;

  // Numbers that differ where the arguments do: each value with its kind before it.
  struct Key {
    enum Kind : int64_t { integer, boolean, string, sequence };
    std::vector<int64_t> numbers;

    Key() { numbers.reserve(48); }
    bool operator==(const Key& other) const { return numbers == other.numbers; }

    template <typename... Numbers>
    void add(int64_t number, Numbers... more) {
      numbers.push_back(number);
      (numbers.push_back(more), ...);
    }

    bool add_integer(PyObject* object) {
      int overflow = 0;
      add(integer, PyLong_AsLongLongAndOverflow(object, &overflow));
      return !overflow;
    }

    bool add(py::handle value) {
      PyObject* object = value.ptr();
      if (PyBool_Check(object)) {
        add(boolean, object == Py_True);
      } else if (PyLong_Check(object)) {
        return add_integer(object);
      } else if (PyUnicode_CheckExact(object)) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(object, &size);
        if (!text) throw py::error_already_set();
        add(string, size);
        numbers.insert(numbers.end(), text, text + size);
      } else if (PyTuple_CheckExact(object) || PyList_CheckExact(object)) {
        add(sequence, PySequence_Fast_GET_SIZE(object));
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
          PyObject* entry = PySequence_Fast_GET_ITEM(object, i);
          if (!PyLong_Check(entry) || !add_integer(entry)) return false;
        }
      } else {
        return false;
      }
      return true;
    }
  };

  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, a number at a time
      for (const int64_t number : key.numbers) {
        hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3;
      }
      return hash ^ hash >> 32;
    }
  };

  std::shared_ptr<ConvKernel> make(const Tensor& x, const Geometry& geometry) const {
    py::tuple shape(x.dim());
    for (int64_t d = 0; d < x.dim(); ++d) shape[d] = x.size(d);
    const auto call = [&](const auto&... values) {
      return plan_(op_, shape, item_size(x.scalar_type()), values...);
    };
    return std::apply(call, geometry).cast<std::shared_ptr<ConvKernel>>();
  }

  const py::str op_;
  const py::object plan_;
  std::unordered_map<Key, std::shared_ptr<ConvKernel>, Hash> kernels_;
};

}  // namespace kfac_fast
