#pragma once
// The layers that the operators on gradients take as lists of tensors.

#include "layer.h"
#include "tensor_lists.h"

namespace kfac_fast {

// The matrix `index` of a stacked batch.
template <typename T, typename Tensor>
Strided<T> matrix_of(const Tensor& tensor, int64_t index) {
  const int64_t dims = tensor.dim();
  return {entry_of<T>(tensor, dims - 2, index), tensor.stride(dims - 2), tensor.stride(dims - 1)};
}

// All layers that are not empty, those of a stacked batch one by one.
template <typename T, typename Tensor>
std::vector<Layer<T>> layers_of(const std::vector<Tensor>& grads, const std::vector<Tensor>& rights,
                                const std::vector<Tensor>& lefts, const std::vector<Tensor>& out) {
  std::vector<Layer<T>> layers;
  layers.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t dims = grads[i].dim();
    const int64_t rows = grads[i].size(dims - 2), columns = grads[i].size(dims - 1);
    if (grads[i].numel() == 0) continue;
    T* target = static_cast<T*>(out[i].mutable_data_ptr());
    const int64_t count = grads[i].numel() / (rows * columns);
    for (int64_t n = 0; n < count; ++n, target += rows * columns) {
      layers.push_back({rows, columns, matrix_of<T>(grads[i], n), matrix_of<T>(lefts[i], n),
                        matrix_of<T>(rights[i], n), target});
    }
  }
  return layers;
}

// The check of precondition and cholesky_precondition.
template <typename Tensor>
bool layer_lists_pass(const std::vector<Tensor>& grads, const std::vector<Tensor>& rights,
                      const std::vector<Tensor>& lefts, const std::vector<Tensor>& out,
                      const Tensor& inner, std::optional<int32_t> gpu = {}) {
  const size_t count = grads.size();
  if (rights.size() != count || lefts.size() != count || out.size() != count) return false;
  const ScalarType type = inner.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) return false;
  ListCheck check(type, gpu);
  for (size_t i = 0; i < count; ++i) {
    const int64_t dims = grads[i].dim();
    if (dims < 2 || !check.reads(grads[i]) || !check.writes(out[i])) return false;
    if (!same_shape(grads[i], out[i], dims)) return false;
    if (!is_side(rights[i], grads[i], dims - 1) || !check.reads(rights[i])) return false;
    if (!is_side(lefts[i], grads[i], dims - 2) || !check.reads(lefts[i])) return false;
  }
  return inner.dim() == 0 && check.writes(inner) && check.apart();
}

}  // namespace kfac_fast
