#pragma once
// What the CPU operators share in taking tensors apart. Their arguments have passed the checks of
// kfac_fast/schema.py; what guards memory is repeated here.

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "image_source.h"
#include "narrow_float.h"

namespace kfac_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls run.operator()<In, T>() for the dtype of x: its elements are In, the result's T.
template <typename Run>
void for_dtype(const char* op, const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run.template operator()<float, float>();
    case ScalarType::Double:
      return run.template operator()<double, double>();
    case ScalarType::BFloat16:
      return run.template operator()<BFloat16, float>();
    case ScalarType::Half:
      return run.template operator()<Half, float>();
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float64, bfloat16 or float16");
  }
}

inline void check_out(const char* op, const Tensor& x, const Tensor& out, int64_t size) {
  const ScalarType result =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(out.scalar_type() == result && out.is_contiguous() && out.numel() == size, op,
                  ": out must be contiguous with ", size, " elements of the result's dtype, got ",
                  out.numel());
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

}  // namespace kfac_fast
