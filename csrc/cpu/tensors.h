#pragma once
// A tensor as the CPU kernels see it, and what they share in taking it apart.

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "image_source.h"
#include "narrow_float.h"
#include "row_source.h"

namespace kfac_fast {

using torch::headeronly::ScalarType;

// A view on the CPU that lives no longer than the call; its methods are named as torch's own.
class Tensor {
 public:
  Tensor() = default;
  Tensor(void* data, ScalarType type, int64_t dims, const int64_t* sizes, const int64_t* strides)
      : data_(data), type_(type), dims_(dims), sizes_(sizes), strides_(strides) {}

  ScalarType scalar_type() const { return type_; }
  int64_t dim() const { return dims_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dims_; ++d) count *= sizes_[d];
    return count;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t step = 1;
    for (int64_t d = dims_ - 1; d >= 0; --d) {
      if (sizes_[d] == 1) continue;
      if (strides_[d] != step) return false;
      step *= sizes_[d];
    }
    return true;
  }

  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  int32_t get_device_index() const { return -1; }

 private:
  void* data_ = nullptr;
  ScalarType type_ = ScalarType::Undefined;
  int64_t dims_ = 0;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
};

using Sizes = std::vector<int64_t>;

// What an operator writes: the caller's tensor, or one that is made once its sizes are known.
class Result {
 public:
  // Of these sizes; empty if what is made has no memory of its own.
  using Make = std::function<std::optional<Tensor>(const Sizes& sizes, ScalarType type)>;

  explicit Result(const Tensor& given) : tensor_(given) {}
  explicit Result(Make make) : make_(std::move(make)) {}

  // Whether there is a tensor of these sizes.
  bool is_of(const Sizes& sizes, ScalarType type) {
    if (make_) {
      const auto made = make_(sizes, type);
      if (!made) return false;
      tensor_ = *made;
    }
    if (tensor_.dim() != static_cast<int64_t>(sizes.size())) return false;
    for (int64_t d = 0; d < tensor_.dim(); ++d) {
      if (tensor_.size(d) != sizes[d]) return false;
    }
    return true;
  }

  const Tensor& tensor() const { return tensor_; }
  void* data() const { return tensor_.mutable_data_ptr(); }

 private:
  Make make_;
  Tensor tensor_;
};

// Calls run.operator()<In, T>() for the dtype of x, which has passed the check (checks.h): its
// elements are In, the result's T.
template <typename Run>
void for_dtype(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run.template operator()<float, float>();
    case ScalarType::Double:
      return run.template operator()<double, double>();
    case ScalarType::BFloat16:
      return run.template operator()<BFloat16, float>();
    default:
      return run.template operator()<Half, float>();
  }
}

template <typename In>
ImageSource<In> image_of(const Tensor& x) {
  const int64_t missing = spatial_axes - (x.dim() - 2);
  ImageSource<In> source{static_cast<const In*>(x.const_data_ptr()),
                         x.size(0),
                         x.size(1),
                         x.stride(0),
                         x.stride(1),
                         {}};
  for (int64_t i = missing; i < spatial_axes; ++i) source.strides[i] = x.stride(i - missing + 2);
  return source;
}

// The rows of a tensor [*, D].
template <typename In>
RowSource<In> rows_of(const Tensor& x, const std::optional<Tensor>& mask) {
  const int64_t leading = x.dim() - 1;
  std::vector<Axis> axes;
  for (int64_t i = 0; i < leading; ++i) {
    axes.push_back({x.size(i), x.stride(i), mask ? mask->stride(i) : 0});
  }
  return {static_cast<const In*>(x.const_data_ptr()), x.stride(leading),
          mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, axes};
}

}  // namespace kfac_fast
