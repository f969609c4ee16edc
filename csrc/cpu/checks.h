#pragma once
// The check of accumulating operators, repeated from kfac_fast/schema.py for its speed; see
// tensor_lists.h.

#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "tensor_lists.h"
#include "tensors.h"

namespace kfac_fast {

// The sizes of a result with a row, or a square, of this width for each of several groups.
inline Sizes stack_of_squares(int64_t groups, int64_t width) {
  return groups == 1 ? Sizes{width, width} : Sizes{groups, width, width};
}
inline Sizes stack_of_rows(int64_t rows, int64_t groups, int64_t width) {
  return groups == 1 ? Sizes{rows, width} : Sizes{rows, groups, width};
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline ScalarType result_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool inputs_pass(ListCheck& check, std::initializer_list<const Tensor*> inputs) {
  if (!is_floating(check.type())) return false;
  for (const Tensor* input : inputs) {
    if (!check.reads(*input)) return false;
  }
  return true;
}

// Whether the result is of these sizes, or has been made so, and shares memory with nothing. What
// is read has been checked, so that nothing is made for a call that is refused.
inline bool result_passes(ListCheck& check, Result& out, const Sizes& sizes) {
  const ScalarType type = result_type(check.type());
  return out.is_of(sizes, type) && check.writes(out.tensor(), type) && check.apart();
}

// The dtypes, alike in all inputs, and the result.
inline bool tensors_pass(std::initializer_list<const Tensor*> inputs,
                         const std::optional<Tensor>& mask, const std::optional<Tensor>& segments,
                         Result& out, const Sizes& sizes) {
  ListCheck check((*inputs.begin())->scalar_type());
  return inputs_pass(check, inputs) && (!mask || check.reads(*mask, ScalarType::Bool)) &&
         (!segments || check.reads(*segments, ScalarType::Long)) &&
         result_passes(check, out, sizes);
}

// The same of inputs and of others, in the dtype of the result, that may be there.
inline bool tensors_pass(std::initializer_list<const Tensor*> inputs,
                         std::initializer_list<const std::optional<Tensor>*> others, Result& out,
                         const Sizes& sizes) {
  ListCheck check((*inputs.begin())->scalar_type());
  if (!inputs_pass(check, inputs)) return false;
  for (const auto* other : others) {
    if (*other && !check.reads(**other, result_type(check.type()))) return false;
  }
  return result_passes(check, out, sizes);
}

// The segment of every row of x [R, D] and their number, or -1 without them.
inline bool segments_pass(const Tensor& x, const std::optional<Tensor>& segments,
                          int64_t num_segments) {
  if (!segments) return num_segments == -1;
  return x.dim() == 2 && is_vector(*segments, x.size(0)) && num_segments >= 0;
}

// A covariance [*, n, n], or one given by its diagonal [n]; not empty.
inline bool is_covariance(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  if (dims == 0 || tensor.numel() == 0) return false;
  return dims == 1 || tensor.size(dims - 1) == tensor.size(dims - 2);
}

// x [*, D] whose features are split into groups, and a mask [*].
inline bool rows_pass(const Tensor& x, const std::optional<Tensor>& mask, int64_t groups) {
  const int64_t last = x.dim() - 1;
  if (last < 0 || (mask && !same_shape(*mask, x, last))) return false;
  return groups >= 1 && x.size(last) % groups == 0;
}

// The input of a normalisation, the gradient of its output, and what is added to variances.
inline bool norm_inputs_pass(const Tensor& x, const Tensor& gradient, double eps) {
  return x.dim() >= 2 && same_shape(gradient, x, x.dim()) && eps >= 0 && std::isfinite(eps);
}

// x [N, C, *sizes] whose channels are split into groups.
inline bool images_pass(const Tensor& x, const std::vector<int64_t>& sizes, int64_t groups) {
  if (x.dim() != static_cast<int64_t>(sizes.size()) + 2 || x.size(1) % groups != 0) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (x.size(static_cast<int64_t>(d) + 2) != sizes[d]) return false;
  }
  return true;
}

}  // namespace kfac_fast
