#pragma once
// The check of operators' tensors, repeated from kfac_fast/schema.py because there
// it would take longer than small kernels. It says no more than whether all is well: if not, the
// check in Python tells why. Tensor is a view (cpu/tensors.h) or torch's own.

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace kfac_fast {

using torch::headeronly::ScalarType;

// In bytes, of the dtypes that operators take.
inline int64_t item_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Bool:
      return 1;
    default:  // bfloat16 and float16
      return 2;
  }
}

// Whether the first `dims` sizes are the same and `a` has no more.
template <typename Tensor>
bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  if (a.dim() != dims || b.dim() < dims) return false;
  for (int64_t d = 0; d < dims; ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Whether `side` is a square for every matrix of `grad`, as wide as its dimension `d`.
template <typename Tensor>
bool is_side(const Tensor& side, const Tensor& grad, int64_t d) {
  const int64_t dims = grad.dim();
  if (side.dim() != dims || side.size(dims - 2) != grad.size(d)) return false;
  if (side.size(dims - 1) != grad.size(d)) return false;
  for (int64_t i = 0; i < dims - 2; ++i) {
    if (side.size(i) != grad.size(i)) return false;
  }
  return true;
}

template <typename Tensor>
bool is_vector(const Tensor& tensor, int64_t size) {
  return tensor.dim() == 1 && tensor.size(0) == size;
}

// Whether it is a stack of square matrices of at least one row.
template <typename Tensor>
bool are_squares(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  return dims >= 2 && tensor.size(dims - 1) == tensor.size(dims - 2) && tensor.size(dims - 1) > 0;
}

// The number of entries of the first `dims` dimensions of a stack.
template <typename Tensor>
int64_t stack_size(const Tensor& tensor, int64_t dims) {
  int64_t count = 1;
  for (int64_t d = 0; d < dims; ++d) count *= tensor.size(d);
  return count;
}

// The entry `index` of the first `dims` dimensions of a stack.
template <typename T, typename Tensor>
const T* entry_of(const Tensor& tensor, int64_t dims, int64_t index) {
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
  for (int64_t d = dims - 1; d > 0; --d) {
    data += index % tensor.size(d) * tensor.stride(d);
    index /= tensor.size(d);
  }
  return dims > 0 ? data + index * tensor.stride(0) : data;
}

// Tensors of one dtype, or another that is named, on the CPU or on one GPU, of which what is
// written shares memory with nothing else.
class ListCheck {
 public:
  explicit ListCheck(ScalarType type, std::optional<int32_t> gpu = {}) : type_(type), gpu_(gpu) {}

  ScalarType type() const { return type_; }

  template <typename Tensor>
  bool reads(const Tensor& tensor) {
    return reads(tensor, type_);
  }
  template <typename Tensor>
  bool reads(const Tensor& tensor, ScalarType type) {
    return add(tensor, type, false);
  }
  template <typename Tensor>
  bool writes(const Tensor& tensor) {
    return writes(tensor, type_);
  }
  template <typename Tensor>
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

  template <typename Tensor>
  bool add(const Tensor& tensor, ScalarType type, bool is_written) {
    const bool here =
        gpu_ ? tensor.is_cuda() && tensor.get_device_index() == *gpu_ : tensor.is_cpu();
    if (!here || tensor.scalar_type() != type) return false;
    uintptr_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) == 0) return true;  // uses no memory
      last += (tensor.size(d) - 1) * tensor.stride(d);
    }
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    spans_.push_back({begin, begin + (last + 1) * item_size(type), is_written});
    return true;
  }

  const ScalarType type_;
  const std::optional<int32_t> gpu_;
  std::vector<Span> spans_;
};

// Whether there is one tensor with the damping of each matrix, those of a stack in its order.
template <typename Tensor>
bool is_joint(const std::vector<Tensor>& damping, int64_t matrices) {
  return damping.size() == 1 && is_vector(damping[0], matrices);
}

// The check of damped_inverse and damped_cholesky.
template <typename Tensor>
bool damped_lists_pass(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
                       const std::vector<Tensor>& out, const Tensor& info,
                       const std::optional<Tensor>& logdet, std::optional<int32_t> gpu = {}) {
  const size_t count = matrices.size();
  if (count == 0 || out.size() != count) return false;
  const ScalarType type = matrices[0].scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) return false;
  ListCheck check(type, gpu);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t dims = matrices[i].dim();
    if (!are_squares(matrices[i])) return false;
    if (!check.reads(matrices[i]) || !check.writes(out[i])) return false;
    if (!same_shape(matrices[i], out[i], dims)) return false;
    total += stack_size(matrices[i], dims - 2);
  }
  if (!is_joint(damping, total)) {
    if (damping.size() != 1 && damping.size() != count) return false;
    for (size_t i = 0; i < count; ++i) {
      const Tensor& shift = damping[damping.size() == 1 ? 0 : i];
      if (shift.dim() != 0 && !same_shape(shift, matrices[i], matrices[i].dim() - 2)) return false;
    }
  }
  for (const Tensor& shift : damping) {
    if (!check.reads(shift)) return false;
  }
  if (!is_vector(info, total) || !check.writes(info, ScalarType::Int)) return false;
  if (logdet && (!is_vector(*logdet, total) || !check.writes(*logdet))) return false;
  return check.apart();
}

}  // namespace kfac_fast
