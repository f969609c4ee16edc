#pragma once
// The check of operators on long lists of tensors, repeated from kfac_fast/schema.py because there
// it would take longer than the kernels. It says no more than whether all is well: if not, the
// check in Python tells why.

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensors.h"

namespace kfac_fast {

// Whether the first `dims` sizes are the same and `a` has no more.
inline bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  if (a.dim() != dims || b.dim() < dims) return false;
  for (int64_t d = 0; d < dims; ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Whether `side` is a square for every matrix of `grad`, as wide as its dimension `d`.
inline bool is_side(const Tensor& side, const Tensor& grad, int64_t d) {
  const int64_t dims = grad.dim();
  if (side.dim() != dims || side.size(dims - 2) != grad.size(d)) return false;
  if (side.size(dims - 1) != grad.size(d)) return false;
  for (int64_t i = 0; i < dims - 2; ++i) {
    if (side.size(i) != grad.size(i)) return false;
  }
  return true;
}

inline bool is_vector(const Tensor& tensor, int64_t size) {
  return tensor.dim() == 1 && tensor.size(0) == size;
}

// The entry `index` of the first `dims` dimensions of a stack.
template <typename T>
const T* entry_of(const Tensor& tensor, int64_t dims, int64_t index) {
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
  for (int64_t d = dims - 1; d >= 0; --d) {
    data += index % tensor.size(d) * tensor.stride(d);
    index /= tensor.size(d);
  }
  return data;
}

// Tensors of one dtype, or another that is named, on the CPU, of which what is written shares
// memory with nothing else.
class ListCheck {
 public:
  explicit ListCheck(ScalarType type) : type_(type) {}

  bool reads(const Tensor& tensor) { return add(tensor, type_, false); }
  bool writes(const Tensor& tensor) { return writes(tensor, type_); }
  bool writes(const Tensor& tensor, ScalarType type) {
    return tensor.is_contiguous() && add(tensor, type, true);
  }

  bool apart() {
    std::sort(spans_.begin(), spans_.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    uintptr_t used = 0, written = 0;
    for (const Span& span : spans_) {
      if (span.begin < (span.is_written ? used : written)) return false;
      used = std::max(used, span.end);
      if (span.is_written) written = std::max(written, span.end);
    }
    return true;
  }

 private:
  struct Span {  // in bytes
    uintptr_t begin, end;
    bool is_written;
  };

  bool add(const Tensor& tensor, ScalarType type, bool is_written) {
    if (!tensor.is_cpu() || tensor.scalar_type() != type) return false;
    const uintptr_t size = type == ScalarType::Double ? 8 : 4;
    uintptr_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) == 0) return true;  // uses no memory
      last += (tensor.size(d) - 1) * tensor.stride(d);
    }
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    spans_.push_back({begin, begin + (last + 1) * size, is_written});
    return true;
  }

  const ScalarType type_;
  std::vector<Span> spans_;
};

}  // namespace kfac_fast
